/* Ports and addresses of all kinds, strings, the serial port, interrupts as fast as they go. */
#include "hostile.h"

/* What ends the machine when it is written to as meant; `exits` writes there what is not meant. */
static bool ends_the_machine(u32 port)
{
    return port == I8042_COMMAND || port == PVPANIC || (port >= SLEEP_CONTROL && port <= RESET);
}

static void ports(void)
{
    /* Beyond the last port there is no permission to ask for. */
    u32 step = option_number("full", 0) ? 1 : 31;
    for (u32 port = 0; port + 4 <= 0x10000; port += port < 0x1000 ? 1 : step) {
        /* The serial port says all this. */
        if (port >= SERIAL - 3 && port < SERIAL + 8)
            continue;
        inb(port), inw(port), inl(port);
        if (ends_the_machine(port) || ends_the_machine(port + 1) || ends_the_machine(port + 2))
            continue;
        outb(port, 0xff), outw(port, noise()), outl(port, noise());
    }
    /* The interrupt controllers and the timer have got some of it. */
    outb(0x21, 0xff), outb(0xa1, 0xff);
    conclude_platform("ports", true);
}

/* Not written to: what is KVM's own, where a write may be an INIT to this CPU. */
static bool is_kvms(u64 at)
{
    return at >= 0xfec00000 && (at & 0xfff00000) <= 0xfff00000;
}

static void sweep(u64 from, u64 to, u64 step)
{
    for (u64 at = from; at < to; at += step) {
        u64 place = at + noise() % 0xff8;
        readb(place), readw(place), readl(place), readq(place);
        if (!is_kvms(at))
            writeb(place, noise() & 0x7a), writew(place, noise()), writel(place, noise()), writeq(place, noise());
    }
}

static void addresses(void)
{
    sweep(0xc0000000, 0xc0002000, 0x100);
    sweep(0xc0040000, 0xc0100000, 0x1000);
    sweep(0xc0100000, 0xd0000000, 0x100000);
    sweep(0xd0100000, 0xe0000000, 0x100000);
    sweep(0xe0100000, 0xfffff000, 0x40000);
    /* Beyond RAM, and in the window for 64-bit BARs. */
    for (u32 bit = 33; bit < 46; bit++) {
        u64 at = 1ull << bit;
        if (at < ram_end() || bit % 3 != 0)
            continue;
        map_device(at, 0x1000);
        sweep(at, at + 0x1000, 0x100);
    }
    conclude_platform("addresses", true);
}

static void strings(void)
{
    u64 count = 20000;
    void *at = area;
    asm volatile("rep insb" : "+D"(at), "+c"(count) : "d"(0x5f0) : "memory");
    count = 10000, at = area;
    asm volatile("rep outsl" : "+S"(at), "+c"(count) : "d"(0x5f0) : "memory");
    count = 5000, at = area;
    asm volatile("rep insl" : "+D"(at), "+c"(count) : "d"(0xcfc) : "memory");
    count = 5000, at = area;
    asm volatile("rep outsw" : "+S"(at), "+c"(count) : "d"(0xcf9) : "memory");
    /* From and to registers. */
    count = 64, at = (void *)EVENT_DEVICE;
    asm volatile("rep insb" : "+D"(at), "+c"(count) : "d"(0x5f0) : "memory");
    count = 64, at = (void *)0xc0800000;
    asm volatile("rep outsb" : "+S"(at), "+c"(count) : "d"(0x5f0) : "memory");
    conclude_platform("strings", true);
}

/* Loop-back with more than the FIFO holds, interrupts on, every register in every width. */
static void serial(void)
{
    u8 mcr = inb(SERIAL + 4), ier = inb(SERIAL + 1), lcr = inb(SERIAL + 3);
    outb(SERIAL + 4, 0x1f);
    for (u32 i = 0; i < 2000; i++) {
        outb(SERIAL + 1, i);
        outb(SERIAL, i);
        if (i % 3 == 0)
            inb(SERIAL);
        outb(SERIAL + 2, i);
        outb(SERIAL + 7, i);
    }
    for (u32 i = 0; i < 8; i++) {
        inw(SERIAL + i), inl(SERIAL + i);
        outw(SERIAL + i, 0x6161), outl(SERIAL + i, 0x61616161);
        inb(SERIAL + i);
    }
    outb(SERIAL + 3, 0x80), outb(SERIAL, 1), outb(SERIAL + 1, 0);
    outb(SERIAL + 3, lcr), outb(SERIAL + 1, ier), outb(SERIAL + 4, mcr);
    while (inb(SERIAL + 5) & 1)
        inb(SERIAL);
    conclude_platform("serial", true);
}

/* Interrupts to this CPU, which takes none: of its APIC to itself, and of a device for each buffer and each kick. */
static void storm(void)
{
    enum { SPURIOUS = 0xf0, COMMAND = 0x300, TO_SELF = 1 << 18, VECTOR = 0x29 };
    u64 rounds = option_number("storm", 30000);
    writel(LAPIC + SPURIOUS, 0x1ff);
    u64 since = timestamp();
    for (u64 i = 0; i < rounds; i++)
        writel(LAPIC + COMMAND, TO_SELF | VECTOR);
    print("self-interrupts=%lu Mcycles=%lu\n", rounds, (timestamp() - since) / 1000000);

    struct virtio *rng = &target->device;
    bool fine = begin(0, 0);
    if (rng->mmio == 0) {
        u64 table = (rng->common & ~0x7fffull) + 0x4000;
        for (u32 vector = 0; vector < 2; vector++) {
            writeq(table + 16 * vector, 0xfee00000 | (readl(LAPIC + 0x20) >> 24) << 12);
            writel(table + 16 * vector + 8, VECTOR + vector);
            writel(table + 16 * vector + 12, 0);
        }
        for (u8 at = pci_readb(rng->slot, 0x34); at != 0; at = pci_readb(rng->slot, at + 1))
            if (pci_readb(rng->slot, at) == 0x11)
                pci_writew(rng->slot, at + 2, 0x8000);
        writew(rng->common + 22, 0);
        writew(rng->common + 26, 0);
    }
    for (u16 i = 0; i < queue.size; i++)
        write_descriptor(i, (u64)area, 1, CHAIN_WRITE, 0);
    since = timestamp();
    for (u64 i = 0; fine && i < rounds; i++) {
        /* Never more than the ring holds, or it were an index jump. */
        if ((u16)(queue.avail.index - volatile_read(queue.used.index)) < queue.size)
            publish(i % queue.size);
        queue_kick(&queue);
    }
    print("kicks=%lu answers=%u Mcycles=%lu\n", rounds, (u32)volatile_read(queue.used.index),
          (timestamp() - since) / 1000000);
    fine = fine && !(virtio_status(rng) & STATUS_NEEDS_RESET);
    for (u8 at = rng->mmio == 0 ? pci_readb(rng->slot, 0x34) : 0; at != 0; at = pci_readb(rng->slot, at + 1))
        if (pci_readb(rng->slot, at) == 0x11)
            pci_writew(rng->slot, at + 2, 0);
    conclude("storm", fine ? SURVIVED : FAILED);
}

const struct attack platform_attacks[] = {
    {"ports", ports},   {"addresses", addresses}, {"strings", strings},
    {"serial", serial}, {"storm", storm},         {NULL, NULL},
};
