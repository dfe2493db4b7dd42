/*
 * Port and memory accesses of every width to what is there and what is not. Nothing here may end the machine, and
 * what nobody answers reads ones.
 */
#include "virtio.h"

enum { FREE_PORT = 0x5f0, SCRATCH = SERIAL + 7 };
#define FREE_ADDRESS 0xcff00000ull

static void expect(const char *name, u64 want, u64 got)
{
    check(got == want, name, "%lx, not %lx", got, want);
}

static void ports(void)
{
    outb(FREE_PORT, 0x12);
    outw(FREE_PORT, 0x1234);
    outl(FREE_PORT, 0x12345678);
    expect("free-port-1", 0xff, inb(FREE_PORT));
    expect("free-port-2", 0xffff, inw(FREE_PORT));
    expect("free-port-4", 0xffffffff, inl(FREE_PORT));
    expect("last-port-1", 0xff, inb(0xffff));
    /* Goes over the end of the port space. */
    expect("last-port-4", 0xffffffff, inl(0xffff));

    outb(SCRATCH, 0x5a);
    expect("scratch", 0x5a, inb(SCRATCH));
    expect("pvpanic", 1, inb(PVPANIC));
    expect("keyboard-status", 0, inb(I8042_COMMAND));
    expect("sleep-status", 0, inb(SLEEP_STATUS));
}

/* If one of these took effect, the lines after it would be missing. */
static void wide_port_writes(void)
{
    outw(SLEEP_CONTROL, 0x3434);
    outl(SLEEP_CONTROL, 0x01343434);
    outl(SLEEP_CONTROL - 1, 0x34343434);
    outw(SLEEP_STATUS, 0x0101);
    outw(RESET, 0x0101);
    outw(I8042_COMMAND, 0xfefe);
    outl(I8042_COMMAND, 0xfefefefe);
    outw(PVPANIC, 0x0101);
    outb(SLEEP_CONTROL, 0x30); /* S4 */
    outb(SLEEP_CONTROL, 0x14); /* S5 without enable */
    passed("wide-port-writes");
    expect("wide-sleep-read", 0xffff, inw(SLEEP_CONTROL));
    expect("wide-pvpanic-read", 0xffffffff, inl(PVPANIC));
}

static void string_accesses(void)
{
    static const char text[] = "string\n";
    const char *from = text;
    u64 count = sizeof(text) - 1;
    asm volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(SERIAL) : "memory");
    check(count == 0 && from == text + sizeof(text) - 1, "string-out", "%lu bytes left", count);

    u8 bytes[4] = {0};
    u8 *to = bytes;
    count = sizeof(bytes);
    asm volatile("rep insb" : "+D"(to), "+c"(count) : "d"(SCRATCH) : "memory");
    expect("string-in", 0x5a5a5a5a, *(u32 *)bytes);

    u32 words[3] = {0};
    to = (u8 *)words;
    count = 3;
    asm volatile("rep insl" : "+D"(to), "+c"(count) : "d"(FREE_PORT) : "memory");
    expect("string-in-4", 0xffffffff, words[0] & words[1] & words[2]);
}

/* Every width at one address. */
static void expect_ones(const char *name, u64 address)
{
    u64 all = readb(address) | ~0xffull;
    all &= readw(address) | ~0xffffull;
    all &= readl(address) | ~0xffffffffull;
    all &= readq(address);
    expect(name, ~0ull, all);
}

static void memory(void)
{
    writeb(FREE_ADDRESS, 0);
    writew(FREE_ADDRESS, 0);
    writel(FREE_ADDRESS, 0);
    writeq(FREE_ADDRESS, 0);
    expect_ones("free-address", FREE_ADDRESS);
    expect_ones("free-address-odd", FREE_ADDRESS + 3);
    expect_ones("boot-mark-page", BOOT_MARK);

    u64 end = 0;
    for (u32 i = 0; i < boot.ranges; i++)
        if (boot.map[i].type == 1 && boot.map[i].start < BOOT_MARK)
            end = boot.map[i].start + boot.map[i].size;
    if (end != 0 && end < BOOT_MARK)
        expect_ones("after-ram", end);

    writew(BOOT_MARK, 123);
    writeb(BOOT_MARK, 122);
    writeb(BOOT_MARK + 1, 123);
    passed("no-boot-mark");

    expect("events-4", 0, readl(EVENT_DEVICE));
    expect("events-1", 0xff, readb(EVENT_DEVICE));
    expect("events-8", ~0ull, readq(EVENT_DEVICE));
    expect("events-odd", 0xffffffff, readl(EVENT_DEVICE + 2));
    expect("events-after", 0xffffffff, readl(EVENT_DEVICE + 0xffc));
    writeq(EVENT_DEVICE + 8, ~0ull);
    writeb(EVENT_DEVICE + 12, 0xff);
    /* The last four bytes of one device and the first four of the next: two accesses. */
    expect("over-the-edge", 0xffffffff, readq(EVENT_DEVICE - 4));
}

static void configuration(void)
{
    u32 id = pci_readl(0, 0);
    check((id & 0xffff) != 0xffff, "host-bridge", "%x", id);
    expect("config-2", id >> 16, pci_readw(0, 2));
    expect("config-1", id >> 8 & 0xff, pci_readb(0, 1));
    expect("config-odd-2", id >> 8 & 0xffff, pci_readw(0, 1));
    inl(0xcfe);
    outl(0xcfd, ~0u);
    outb(0xcf8, 0);
    inw(0xcfb);
    expect("config-again", id, pci_readl(0, 0));

    expect("absent-4", 0xffffffff, pci_readl(31, 0));
    expect("absent-2", 0xffff, pci_readw(31, 2));
    expect("absent-1", 0xff, pci_readb(31, 3));
    pci_writel(31, 4, 0);
    outl(0xcf8, 0x00000000);
    expect("disabled", 0xffffffff, inl(0xcfc));
    outl(0xcf8, 0x80010000);
    expect("other-bus", 0xffffffff, inl(0xcfc));
    outl(0xcf8, 0x80000100);
    expect("other-function", 0xffffffff, inl(0xcfc));

    expect("ecam-4", id, readl(ecam(0, 0)));
    expect("ecam-2", id >> 16, readw(ecam(0, 2)));
    expect("ecam-1", id >> 24, readb(ecam(0, 3)));
    /* Neither aligned nor of a width that configuration space knows: any answer will do. */
    readq(ecam(0, 0));
    readl(ecam(0, 0xffe));
    writeq(ecam(0, 0xffc), ~0ull);
    writel(ecam(0, 1), ~0u);
    expect("ecam-again", id, readl(ecam(0, 0)));
    expect_ones("ecam-absent", ecam(31, 0));
    expect_ones("ecam-after", ECAM + 0x100000);
}

void main(void)
{
    ports();
    wide_port_writes();
    string_accesses();
    memory();
    if (option_number("pci", 1) != 0)
        configuration();
    summary();
}
