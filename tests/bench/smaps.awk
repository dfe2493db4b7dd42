# Reads /proc/PID/smaps; `slots` is the sizes of the guest's memory slots in KiB, separated by commas.
# Prints four sums of PSS in KiB: outside the guest's memory; of it the program's file; of it private memory; the guest's.
#
# A slot is a run of adjoining private mappings without a name that ends at a large one and has exactly the slot's
# size: a monitor may treat parts of it differently. Exits with 1 when a slot is not found.
function hex(text,    i, value) {
    value = 0
    for (i = 1; i <= length(text); i++)
        value = value * 16 + index("0123456789abcdef", substr(text, i, 1)) - 1
    return value
}
/^[0-9a-f]+-[0-9a-f]+ / {
    split($1, range, "-")
    count++
    from[count] = hex(range[1]) / 1024
    to[count] = hex(range[2]) / 1024
    name[count] = $6
    inode[count] = $5
    shared[count] = substr($2, 4, 1) == "s"
}
$1 == "Pss:" { pss[count] = $2 }
END {
    wanted = split(slots, size, ",")
    for (s = 1; s <= wanted; s++) {
        found = 0
        for (last = count; last >= 1 && !found; last--) {
            if (name[last] != "" || guest[last] || to[last] - from[last] < size[s] / 2)
                continue
            for (first = last; first >= 1 && name[first] == "" && !guest[first]; first--) {
                if (to[last] - from[first] >= size[s])
                    break
                if (from[first] != to[first - 1])
                    break
            }
            if (to[last] - from[first] == size[s]) {
                for (i = first; i <= last; i++)
                    guest[i] = 1
                found = 1
            }
        }
        if (!found)
            exit 1
    }
    for (i = 1; i <= count; i++) {
        if (guest[i]) {
            inside += pss[i]
            continue
        }
        outside += pss[i]
        if (inode[i] != 0 && !shared[i])
            file += pss[i]
        else
            anonymous += pss[i]
    }
    print outside, file, anonymous + 0, inside + 0
}
