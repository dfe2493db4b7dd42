/* PCI: configuration space, the window in it, the BAR in places that are others', MSI-X tables full of nonsense. */
#include "hostile.h"

enum { COMMAND = 4, BAR0 = 0x10, MSIX_CAPABILITY = 0x11, VENDOR_CAPABILITY = 9, WINDOW = 5 };

static u8 capability(u8 id, u8 type)
{
    u8 slot = target->device.slot;
    for (u8 at = pci_readb(slot, 0x34); at != 0; at = pci_readb(slot, at + 1))
        if (pci_readb(slot, at) == id && (id != VENDOR_CAPABILITY || pci_readb(slot, at + 3) == type))
            return at;
    return 0;
}

/* Through both ways, in every width. Left alone: what moves the BAR or turns MSI-X on, which have attacks of their
   own. */
static void config_noise(void)
{
    u8 slot = target->device.slot, msix = capability(MSIX_CAPABILITY, 0);
    begin(0, 0);
    for (u32 offset = 0; offset < 0x1000; offset += offset < 0x100 ? 1 : 61) {
        u64 at = ecam(slot, offset);
        readb(at), readw(at), readl(at), readq(at);
        if (offset < 0x100)
            pci_readb(slot, offset), pci_readw(slot, offset), pci_readl(slot, offset);
        bool others = (offset + 8 > COMMAND && offset < BAR0 + 8) || (offset + 8 > msix && offset < msix + 4u);
        if (others)
            continue;
        writeb(at, noise()), writew(at, noise()), writel(at, noise()), writeq(at, noise());
        if (offset < 0x100)
            pci_writeb(slot, offset, noise()), pci_writew(slot, offset, noise()), pci_writel(slot, offset, noise());
    }
    conclude("config-noise", SURVIVED);
}

/* Every place in the BAR and beyond through the window, the window's own data too. */
static void window(void)
{
    u8 slot = target->device.slot, at = capability(VENDOR_CAPABILITY, WINDOW);
    const u32 lengths[] = {1, 2, 4, 0, 3, 8, 0xffffffff};
    bool fine = at != 0;
    for (u32 i = 0; fine && i < 600; i++) {
        pci_writeb(slot, at + 4, i % 50 == 49 ? noise() : 0);
        pci_writel(slot, at + 8, i % 10 == 9 ? noise() : i % 2 ? noise() % 0x40 : noise() % 0x8010);
        pci_writel(slot, at + 12, lengths[noise() % 7]);
        pci_readl(slot, at + 16);
        readq(ecam(slot, at + 12));
        pci_writel(slot, at + 16, noise());
        pci_writeb(slot, at + 16 + i % 4, noise());
    }
    conclude("window", fine ? SURVIVED : FAILED);
}

static void set_bar(u64 address)
{
    u8 slot = target->device.slot;
    pci_writel(slot, BAR0, address);
    pci_writel(slot, BAR0 + 4, address >> 32);
}

static void bar_moves(void)
{
    u8 slot = target->device.slot;
    u64 home = target->device.common & ~0x7fffull;
    const u64 places[] = {
        (u64)area & ~0x7fffull, 0x100000, ram_end() - 0x8000, BOOT_MARK, PCI_WINDOW - 0x8000,
        home ^ 0x18000, ECAM, ECAM + 0x8000, 0xfec00000, 0xfee00000, 0xfffb8000, 0xffff8000,
        1ull << 32, 1ull << 38, 0xffffffffffff8000, 0x8000000000000000, 0,
    };
    bool fine = true;
    begin(0, 0);
    memset(area, 0x5a, sizeof(area));
    for (u32 round = 0; round < 2; round++)
        for (u32 i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
            if (round == 0)
                pci_writew(slot, COMMAND, 0);
            set_bar(places[i]);
            pci_writew(slot, COMMAND, 6);
            /* RAM, the configuration space and the other devices are where they were. */
            writel(home + 0x3000, 0);
            fine = fine && neighbour_works() && area[0] == 0x5a && area[0x8000] == 0x5a;
            fine = fine && (u16)readl(ecam(slot, 0)) == 0x1af4 && readl(LAPIC + 0x30) != 0xffffffff;
        }
    pci_writew(slot, COMMAND, 0);
    set_bar(home);
    pci_writew(slot, COMMAND, 6);
    conclude("bar-moves", fine ? SURVIVED : FAILED);
}

/* Pending bits, and table entries behind the last one. */
static void access_pending(u64 pending, u64 entry)
{
    readb(pending), readw(pending), readl(pending), readq(pending);
    writel(pending, noise());
    readq(entry), writeq(entry, noise());
}

/* Messages to CPUs that are not there, of all kinds; vectors that are not there; masks that come and go. Each new
   message costs a host without a fast grace period some milliseconds, of this CPU's time. */
static void msix_nonsense(void)
{
    u8 slot = target->device.slot, at = capability(MSIX_CAPABILITY, 0);
    u64 table = (target->device.common & ~0x7fffull) + 0x4000;
    bool fine = at != 0;
    pci_writew(slot, at + 2, 0x8000);
    for (u32 round = 0; fine && round < 12; round++) {
        for (u32 vector = 0; vector < 3; vector++) {
            /* APIC 0x7f does not exist: an INIT that arrives would be the guest's own end. */
            writel(table + 16 * vector, (noise() & 0xfff00ff0) | 0x7f000);
            writel(table + 16 * vector + 4, round % 2 ? noise() : 0);
            writel(table + 16 * vector + 8, noise());
            writel(table + 16 * vector + 12, noise());
        }
        for (u32 i = 0; i < 100; i++)
            access_pending(table + 0x2000 + noise() % 0x1ff8, table + 16 * (3 + noise() % 500));
        if (begin(0, 0)) {
            writew(target->device.common + 22, 0);
            writew(target->device.common + 26, noise() % 2 ? noise() : noise() % 3);
            writew(target->device.common + 16, noise());
            /* Something to tell: a ring that breaks. */
            write_descriptor(0, ~0ull, 16, CHAIN_WRITE, 0);
            publish(0);
            queue_kick(&queue);
            fine = wait_for_outcome(true) == NEEDS_RESET;
        }
        pci_writew(slot, at + 2, round % 3 ? 0x8000 : 0xc000);
    }
    for (u32 i = 0; i < 100; i++)
        writel(table + 12, i & 1);
    pci_writew(slot, at + 2, 0);
    conclude("msix-nonsense", fine ? SURVIVED : FAILED);
}

const struct attack pci_attacks[] = {
    {"config-noise", config_noise}, {"window", window},  {"bar-moves", bar_moves},
    {"msix-nonsense", msix_nonsense}, {NULL, NULL},
};
