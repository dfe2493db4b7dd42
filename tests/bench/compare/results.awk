# Turns figures (MONITOR, METRIC and VALUE, separated by tabs) into a table in Markdown, and a chart in the file `chart`.
# `conditions` is a file that goes below the table. A ratio says how many times as fast Tranche is, so above 1 is better.
BEGIN {
    FS = "\t"
    # Metric, unit, what divides a figure to that unit, whether less is better, text.
    metric("boot.before", "ms", 1, 1, "boot: monitor, firmware, unpacking")
    metric("boot.kernel", "ms", 1, 1, "boot: kernel to userspace")
    metric("boot.all", "ms", 1, 1, "boot: all of it, to userspace")
    metric("boot.end", "ms", 1, 1, "power-off to the end of the process")
    metric("small.boot.before", "ms", 1, 1, "small kernel: monitor, firmware")
    metric("small.boot.kernel", "ms", 1, 1, "small kernel: kernel to userspace")
    metric("small.boot.all", "ms", 1, 1, "small kernel: all of it")
    disks("", "")
    disks("sync.", "engine=sync: ")
    network("", "")
    network("vhost.", "vhost=on: ")
}
function metric(name, unit, divisor, less, text) {
    order[++metrics] = name
    units[name] = unit; divisors[name] = divisor; lesser[name] = less; texts[name] = text
}
function disks(prefix, text,    d) {
    for (d = 1; d <= 32; d += 31) {
        metric(prefix "disk.read.sequential." d, "MiB/s", 8, 0, text "sequential read, depth " d)
        metric(prefix "disk.write.sequential." d, "MiB/s", 8, 0, text "sequential write, depth " d)
        metric(prefix "disk.read.random." d, "IOPS", 1, 0, text "random read, depth " d)
        metric(prefix "disk.write.random." d, "IOPS", 1, 0, text "random write, depth " d)
    }
    metric(prefix "disk.64m", "ms", 0.001, 1, text "64 MiB in sequence, 1 MiB each")
    metric(prefix "disk.2000", "ms", 0.001, 1, text "2,000 random reads of 4 KiB, depth 1")
}
function network(prefix, text) {
    metric(prefix "net.to-guest", "MB/s", 1e6, 0, text "TCP to the guest")
    metric(prefix "net.from-guest", "MB/s", 1e6, 0, text "TCP from the guest")
    metric(prefix "net.packets-to-guest", "1/s", 1, 0, text "64-byte packets to the guest")
    metric(prefix "net.packets-from-guest", "1/s", 1, 0, text "64-byte packets from the guest")
    metric(prefix "net.ping", "µs", 1, 1, text "ping from the guest")
}

$3 == "failed" { failed[$1 " " $2]++; next }
{ n = ++count[$1 " " $2]; figures[$1 " " $2, n] = $3 }

# Leaves median, least and most of a series in globals; 0 when there is none.
function summary(key,    n, i, j, v, sorted) {
    n = count[key]
    for (i = 1; i <= n; i++) {
        v = figures[key, i] + 0
        for (j = i - 1; j > 0 && sorted[j] > v; j--) sorted[j + 1] = sorted[j]
        sorted[j + 1] = v
    }
    median = n % 2 ? sorted[(n + 1) / 2] : (sorted[n / 2] + sorted[n / 2 + 1]) / 2
    least = sorted[1]; most = sorted[n]
    return n + 0
}
function digits(value) { return sprintf(value >= 100 ? "%.0f" : value >= 10 ? "%.1f" : "%.2f", value) }
# Whether any boot of the series that a metric belongs to failed.
function failures(monitor, name,    prefix) {
    prefix = name
    sub(/(boot|disk|net)\..*/, "", prefix)
    return failed[monitor " " prefix "boot"] + 0
}
function cell(monitor, name,    d) {
    if (!summary(monitor " " name)) return failures(monitor, name) ? "failed" : "-"
    d = divisors[name]
    return digits(median / d) " (" digits(least / d) "–" digits(most / d) ")" (failures(monitor, name) ? " *" : "")
}
function ratio(ours, theirs, name,    a, b) {
    if (!summary(ours " " name)) return ""
    a = median
    if (!summary(theirs " " name)) return ""
    b = median
    if (a <= 0 || b <= 0) return ""
    return lesser[name] ? b / a : a / b
}

END {
    print "| median (least–most) | Tranche, PCI | QEMU q35 | ratio | Tranche, MMIO | QEMU microvm | ratio |"
    print "|---|--:|--:|--:|--:|--:|--:|"
    for (m = 1; m <= metrics; m++) {
        name = order[m]
        pci = ratio("pci", "q35", name); mmio = ratio("mmio", "microvm", name)
        line = sprintf("| %s, %s | %s | %s | %s | %s | %s | %s |", texts[name], units[name], cell("pci", name), cell("q35", name),
            pci == "" ? "" : sprintf("**%.2f**", pci), cell("mmio", name), cell("microvm", name), mmio == "" ? "" : sprintf("**%.2f**", mmio))
        if (line ~ /[0-9]\)| failed /) print line
        if (pci != "" || mmio != "") { bars++; label[bars] = texts[name]; first[bars] = pci; second[bars] = mmio }
    }
    print ""
    print "A ratio is how many times as fast Tranche is over the same transport. `failed`: the guest did not get to its end;"
    print "an asterisk: it did not each time."
    if (summary("mmio small.boot.all")) {
        small = median
        if (summary("pci boot.all")) printf "\nThe small kernel takes %.2f of the stock kernel's time to userspace (%s over PCI with an initrd).\n", small / median, "the latter"
    }
    print ""
    while ((getline text < conditions) > 0) print text
    draw()
}

# Bars from the line of equal speed, on a scale of powers of two.
function draw(    i, y, height) {
    height = 70 + bars * 26
    printf "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"900\" height=\"%d\" font-family=\"sans-serif\" font-size=\"12\">\n", height > chart
    print "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>" > chart
    print "<text x=\"10\" y=\"20\" font-size=\"14\">Tranche next to QEMU: how many times as fast (medians)</text>" > chart
    legend(420, "#1f6f8b", "PCI, next to q35")
    legend(580, "#e0a030", "MMIO, next to microvm")
    for (i = -3; i <= 4; i++) {
        printf "<line x1=\"%.0f\" y1=\"40\" x2=\"%.0f\" y2=\"%d\" stroke=\"%s\"/>\n", at(2 ^ i), at(2 ^ i), height - 24, i ? "#ddd" : "#444" > chart
        printf "<text x=\"%.0f\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", at(2 ^ i), height - 8, i < 0 ? "1/" 2 ^ -i : 2 ^ i > chart
    }
    for (i = 1; i <= bars; i++) {
        y = 44 + (i - 1) * 26
        printf "<text x=\"290\" y=\"%d\" text-anchor=\"end\">%s</text>\n", y + 14, label[i] > chart
        bar(first[i], y, "#1f6f8b")
        bar(second[i], y + 10, "#e0a030")
    }
    print "</svg>" > chart
    close(chart)
}
function legend(x, colour, text) {
    printf "<rect x=\"%d\" y=\"10\" width=\"12\" height=\"12\" fill=\"%s\"/><text x=\"%d\" y=\"20\">%s</text>\n", x, colour, x + 17, text > chart
}
# 300 to 880 across: an eighth to sixteen times.
function at(value) {
    value = log(value) / log(2)
    if (value < -3) value = -3
    if (value > 4) value = 4
    return 300 + (value + 3) * 580 / 7
}
function bar(value, y, colour,    from, to) {
    if (value == "") return
    from = at(1); to = at(value)
    printf "<rect x=\"%.1f\" y=\"%d\" width=\"%.1f\" height=\"9\" fill=\"%s\"><title>%.2f</title></rect>\n", from < to ? from : to, y, from < to ? to - from : from - to, colour, value > chart
}
