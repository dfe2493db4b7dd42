/*
 * Starts every other CPU with INIT and SIPI, and checks that each one says its APIC ID.
 * The APIC IDs are 0 to N-1 with `cpus=N`, or what the MADT says. `apic=x` stays with the xAPIC.
 */
#include "runtime.h"

enum { TRAMPOLINE = 0x10000, CPUS = 0x400 };
enum { INIT = 0x4500, STARTUP = 0x4600 | TRAMPOLINE >> 12 };
enum { MSR_APIC_BASE = 0x1b, MSR_X2APIC_ID = 0x802, MSR_X2APIC_SPURIOUS = 0x80f, MSR_X2APIC_ICR = 0x830 };
enum { XAPIC_ID = 0x20, XAPIC_SPURIOUS = 0xf0, XAPIC_ICR = 0x300, XAPIC_ICR_HIGH = 0x310 };
enum { APIC_BASE_X2APIC = 1 << 10, SPURIOUS_ENABLE = 0x1ff, CPUID_X2APIC = 1 << 21 };

extern const u8 ap_start[], ap_start_end[];
extern volatile u8 ap_seen[CPUS];
extern void ap_main(void);
extern void (*volatile ap_entry)(void);

static u32 ids[CPUS], count;

static void add_cpu(u32 id)
{
    if (count < CPUS && id < CPUS)
        ids[count++] = id;
}

/* ACPI 6.4, section 5.2: RSDP, XSDT, MADT. */
static void find_cpus_in_madt(void)
{
    if (boot.rsdp == 0)
        return;
    u64 xsdt = readq(boot.rsdp + 24);
    for (u64 entry = xsdt + 36; entry < xsdt + readl(xsdt + 4); entry += 8) {
        u64 table = readq(entry);
        if (memcmp((void *)table, "APIC", 4) != 0)
            continue;
        u64 end = table + readl(table + 4);
        for (u64 at = table + 44; at < end && readb(at + 1) != 0; at += readb(at + 1)) {
            if (readb(at) == 0 && readl(at + 4) & 1)
                add_cpu(readb(at + 3));
            if (readb(at) == 9 && readl(at + 8) & 1)
                add_cpu(readl(at + 4));
        }
    }
}

static bool x2apic;

/* In ring 0, where CPUID is what the monitor says on every host. */
static void ask_for_x2apic(void *answer)
{
    u32 registers[4];
    cpuid(1, 0, registers);
    *(bool *)answer = registers[2] & CPUID_X2APIC;
}

/* A disabled APIC sends interrupts too, but KVM may not know the last CPU yet before one is enabled. */
static void enable_apic(void)
{
    supervisor(ask_for_x2apic, &x2apic);
    if (option_is("apic", "x"))
        x2apic = false;
    if (!x2apic) {
        writel(LAPIC + XAPIC_SPURIOUS, SPURIOUS_ENABLE);
        return;
    }
    write_msr(MSR_APIC_BASE, read_msr(MSR_APIC_BASE) | APIC_BASE_X2APIC);
    write_msr(MSR_X2APIC_SPURIOUS, SPURIOUS_ENABLE);
}

static u32 own_id(void)
{
    return x2apic ? read_msr(MSR_X2APIC_ID) : readl(LAPIC + XAPIC_ID) >> 24;
}

static void send(u32 id, u32 command)
{
    if (x2apic) {
        write_msr(MSR_X2APIC_ICR, (u64)id << 32 | command);
        return;
    }
    writel(LAPIC + XAPIC_ICR_HIGH, id << 24);
    writel(LAPIC + XAPIC_ICR, command);
}

static void start_cpus(u32 self)
{
    memcpy((void *)TRAMPOLINE, ap_start, ap_start_end - ap_start);
    ap_entry = ap_main;
    for (u32 i = 0; i < count; i++)
        if (ids[i] != self)
            send(ids[i], INIT);
    for (u32 i = 0; i < count; i++)
        if (ids[i] != self)
            send(ids[i], STARTUP);
}

void main(void)
{
    u32 wanted = option_number("cpus", 0);
    if (wanted > 0)
        for (u32 id = 0; id < wanted; id++)
            add_cpu(id);
    else
        find_cpus_in_madt();

    enable_apic();
    u32 self = own_id();
    print("cpus=%u apic=%s self=%u\n", count, x2apic ? "x2apic" : "xapic", self);
    check(count > 0, "cpus", "the MADT names none");

    u64 since = timestamp();
    start_cpus(self);
    for (u32 i = 0; i < count; i++) {
        while (ids[i] != self && !ap_seen[ids[i]] && within(since, 10))
            pause();
        if (ids[i] == self || ap_seen[ids[i]])
            print("cpu=%u\n", ids[i]);
        else
            failed("cpu", "%u does not answer", ids[i]);
    }
    u32 seen = 0;
    for (u32 id = 0; id < CPUS; id++)
        seen += ap_seen[id];
    check(seen + 1 == count, "all-cpus", "%u answered", seen);
    print("cycles=%lu\n", timestamp() - since);
    summary();
}
