#include "virtio.h"

/* --- PCI --- */

enum { CONFIG_ADDRESS = 0xcf8, CONFIG_DATA = 0xcfc };

static u16 select_register(u8 slot, u8 offset)
{
    outl(CONFIG_ADDRESS, 0x80000000u | (u32)slot << 11 | (offset & 0xfc));
    return CONFIG_DATA + (offset & 3);
}

#define PCI_ACCESS_BODY(type, suffix)                                          \
    type pci_read##suffix(u8 slot, u8 offset)                                  \
    {                                                                          \
        return in##suffix(select_register(slot, offset));                      \
    }                                                                          \
    void pci_write##suffix(u8 slot, u8 offset, type value)                     \
    {                                                                          \
        out##suffix(select_register(slot, offset), value);                     \
    }
PCI_ACCESS_BODY(u8, b)
PCI_ACCESS_BODY(u16, w)
PCI_ACCESS_BODY(u32, l)

enum { PCI_VENDOR = 0, PCI_DEVICE = 2, PCI_COMMAND = 4, PCI_BARS = 0x10, PCI_CAPABILITIES = 0x34 };
enum { COMMAND_MEMORY = 2, COMMAND_MASTER = 4, COMMAND_NO_INTX = 0x400 };

u64 pci_bar(u8 slot, u8 bar)
{
    static u64 next = PCI_WINDOW;
    u8 offset = PCI_BARS + 4 * bar;
    u32 low = pci_readl(slot, offset);
    bool wide = (low & 6) == 4;
    u64 address = (low & ~0xfull) | (wide ? (u64)pci_readl(slot, offset + 4) << 32 : 0);
    if (address == 0) {
        pci_writel(slot, offset, 0xffffffff);
        u64 size = (u32)-(pci_readl(slot, offset) & ~0xfu);
        address = (next + size - 1) & -size;
        next = address + size;
        pci_writel(slot, offset, address);
        if (wide)
            pci_writel(slot, offset + 4, 0);
    }
    return address;
}

/* --- Finding a device --- */

enum { CAPABILITY_VENDOR = 9 };
enum { CFG_COMMON = 1, CFG_NOTIFY = 2, CFG_ISR = 3, CFG_DEVICE = 4 };

/* Section 4.1.4: one vendor capability for each block of registers. */
static void find_blocks(struct virtio *device)
{
    u8 slot = device->slot;
    for (u8 at = pci_readb(slot, PCI_CAPABILITIES); at != 0; at = pci_readb(slot, at + 1)) {
        if (pci_readb(slot, at) != CAPABILITY_VENDOR)
            continue;
        u8 type = pci_readb(slot, at + 3);
        if (type < CFG_COMMON || type > CFG_DEVICE)
            continue;
        u64 block = pci_bar(slot, pci_readb(slot, at + 4)) + pci_readl(slot, at + 8);
        if (block >= 1ull << 32)
            map_device(block, pci_readl(slot, at + 12));
        switch (type) {
        case CFG_COMMON:
            device->common = block;
            break;
        case CFG_NOTIFY:
            device->notify = block;
            device->notify_multiplier = pci_readl(slot, at + 16);
            break;
        case CFG_ISR:
            device->isr = block;
            break;
        case CFG_DEVICE:
            device->config = block;
        }
    }
}

static bool find_behind_pci(struct virtio *device, u16 kind, u32 nth)
{
    for (u8 slot = 0; slot < 32; slot++) {
        if (pci_readw(slot, PCI_VENDOR) != 0x1af4 || pci_readw(slot, PCI_DEVICE) != 0x1040 + kind || nth-- > 0)
            continue;
        *device = (struct virtio){.slot = slot};
        find_blocks(device);
        pci_writew(slot, PCI_COMMAND, COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX);
        return device->common != 0 && device->notify != 0;
    }
    return false;
}

enum { MMIO_MAGIC = 0, MMIO_DEVICE = 8, MMIO_NOTIFY = 0x50, MMIO_CONFIG = 0x100 };

static bool find_over_mmio(struct virtio *device, u16 kind, u32 nth)
{
    for (u64 at = VIRTIO_MMIO; readl(at + MMIO_MAGIC) == 0x74726976; at += VIRTIO_MMIO_SIZE)
        if (readl(at + MMIO_DEVICE) == kind && nth-- == 0) {
            *device = (struct virtio){.mmio = at, .notify = at + MMIO_NOTIFY, .config = at + MMIO_CONFIG};
            return true;
        }
    return false;
}

bool virtio_find(struct virtio *device, u16 kind, u32 nth)
{
    return option_is("transport", "mmio") ? find_over_mmio(device, kind, nth) : find_behind_pci(device, kind, nth);
}

/* --- The registers: the common configuration over PCI (section 4.1.4.3), their own page over MMIO (4.2.2) --- */

enum which {
    DEVICE_FEATURE_SELECT,
    DEVICE_FEATURE,
    DRIVER_FEATURE_SELECT,
    DRIVER_FEATURE,
    DEVICE_STATUS,
    QUEUE_SELECT,
    QUEUE_SIZE_MAX,
    QUEUE_SIZE,
    QUEUE_ENABLE,
    QUEUE_DESCRIPTORS,
    QUEUE_DRIVER,
    QUEUE_DEVICE,
};

/* Offset and width over PCI, offset over MMIO. */
static const struct {
    u8 pci, width, mmio;
} registers[] = {
    [DEVICE_FEATURE_SELECT] = {0, 4, 0x14},
    [DEVICE_FEATURE] = {4, 4, 0x10},
    [DRIVER_FEATURE_SELECT] = {8, 4, 0x24},
    [DRIVER_FEATURE] = {12, 4, 0x20},
    [DEVICE_STATUS] = {20, 1, 0x70},
    [QUEUE_SELECT] = {22, 2, 0x30},
    [QUEUE_SIZE_MAX] = {24, 2, 0x34},
    [QUEUE_SIZE] = {24, 2, 0x38},
    [QUEUE_ENABLE] = {28, 2, 0x44},
    [QUEUE_DESCRIPTORS] = {32, 4, 0x80},
    [QUEUE_DRIVER] = {40, 4, 0x90},
    [QUEUE_DEVICE] = {48, 4, 0xa0},
};

/* Over PCI only. */
enum { MSIX_CONFIG = 16, QUEUE_MSIX_VECTOR = 26, QUEUE_NOTIFY_OFFSET = 30, NO_VECTOR = 0xffff };

static u32 get(const struct virtio *device, enum which which)
{
    u64 at = device->common + registers[which].pci;
    if (device->mmio != 0)
        return readl(device->mmio + registers[which].mmio);
    return registers[which].width == 1 ? readb(at) : registers[which].width == 2 ? readw(at) : readl(at);
}

static void set(const struct virtio *device, enum which which, u32 value)
{
    u64 at = device->common + registers[which].pci;
    if (device->mmio != 0)
        writel(device->mmio + registers[which].mmio, value);
    else if (registers[which].width == 1)
        writeb(at, value);
    else if (registers[which].width == 2)
        writew(at, value);
    else
        writel(at, value);
}

/* Two halves: over PCI these are 64 bits wide, but drivers access them so (section 4.1.3.1). */
static void set_address(const struct virtio *device, enum which which, u64 address)
{
    u64 at = device->mmio != 0 ? device->mmio + registers[which].mmio : device->common + registers[which].pci;
    writel(at, address);
    writel(at + 4, address >> 32);
}

u8 virtio_status(const struct virtio *device)
{
    return get(device, DEVICE_STATUS);
}

void virtio_write_status(const struct virtio *device, u8 value)
{
    set(device, DEVICE_STATUS, value);
}

static void add_status(const struct virtio *device, u8 bits)
{
    virtio_write_status(device, virtio_status(device) | bits);
}

bool virtio_reset(const struct virtio *device)
{
    virtio_write_status(device, 0);
    for (u64 since = timestamp(); virtio_status(device) != 0; pause())
        if (!within(since, 5))
            return false;
    return true;
}

bool virtio_negotiate(struct virtio *device, u64 wanted)
{
    if (!virtio_reset(device))
        return false;
    add_status(device, STATUS_ACKNOWLEDGE);
    add_status(device, STATUS_DRIVER);
    device->offered = 0;
    for (u32 half = 0; half < 2; half++) {
        set(device, DEVICE_FEATURE_SELECT, half);
        device->offered |= (u64)get(device, DEVICE_FEATURE) << 32 * half;
    }
    device->features = device->offered & (wanted | FEATURE_VERSION_1);
    for (u32 half = 0; half < 2; half++) {
        set(device, DRIVER_FEATURE_SELECT, half);
        set(device, DRIVER_FEATURE, device->features >> 32 * half);
    }
    add_status(device, STATUS_FEATURES_OK);
    return virtio_status(device) & STATUS_FEATURES_OK;
}

void virtio_place_queue(struct virtio *device, u16 number, u32 size, u64 descriptors, u64 avail, u64 used)
{
    set(device, QUEUE_SELECT, number);
    set(device, QUEUE_SIZE, size);
    if (device->mmio == 0)
        writew(device->common + QUEUE_MSIX_VECTOR, NO_VECTOR);
    set_address(device, QUEUE_DESCRIPTORS, descriptors);
    set_address(device, QUEUE_DRIVER, avail);
    set_address(device, QUEUE_DEVICE, used);
    set(device, QUEUE_ENABLE, 1);
}

bool virtio_queue(struct virtio *device, u16 number, struct queue *queue)
{
    memset(queue, 0, sizeof(*queue));
    set(device, QUEUE_SELECT, number);
    u32 size = get(device, QUEUE_SIZE_MAX);
    if (size == 0)
        return false;
    if (size > QUEUE_MAX)
        size = QUEUE_MAX;
    queue->device = device;
    queue->number = number;
    queue->size = size;
    queue->doorbell = device->notify;
    if (device->mmio == 0)
        queue->doorbell += readw(device->common + QUEUE_NOTIFY_OFFSET) * device->notify_multiplier;
    virtio_place_queue(device, number, size, (u64)queue->descriptors, (u64)&queue->avail, (u64)&queue->used);
    return true;
}

void virtio_run(struct virtio *device)
{
    if (device->mmio == 0)
        writew(device->common + MSIX_CONFIG, NO_VECTOR);
    add_status(device, STATUS_DRIVER_OK);
}

/* --- Rings --- */

enum { DESCRIPTOR_NEXT = 1, DESCRIPTOR_WRITE = 2, DESCRIPTOR_INDIRECT = 4, USED_NO_NOTIFY = 1 };

/* The `used_event` and `avail_event` fields stand behind the last entry that the ring really has. */
static volatile u16 *avail_event(struct queue *queue)
{
    return (volatile u16 *)&queue->used.ring[queue->size];
}

static void fill(struct descriptor *table, const struct piece *pieces, u32 count)
{
    for (u32 i = 0; i < count; i++) {
        u16 more = i + 1 < count ? DESCRIPTOR_NEXT : 0;
        table[i] = (struct descriptor){
            .address = (u64)pieces[i].at,
            .length = pieces[i].length,
            .flags = more | (pieces[i].device_writes ? DESCRIPTOR_WRITE : 0),
            .next = i + 1,
        };
    }
}

void queue_kick(const struct queue *queue)
{
    if (queue->device->mmio != 0)
        writel(queue->doorbell, queue->number);
    else
        writew(queue->doorbell, queue->number);
}

void queue_submit(struct queue *queue, const struct piece *pieces, u32 count)
{
    u64 features = queue->device->features;
    if (features & FEATURE_INDIRECT) {
        fill(queue->indirect, pieces, count);
        queue->descriptors[0] = (struct descriptor){
            .address = (u64)queue->indirect, .length = count * sizeof(struct descriptor), .flags = DESCRIPTOR_INDIRECT};
    } else {
        fill(queue->descriptors, pieces, count);
    }
    u16 before = queue->avail.index;
    queue->avail.ring[before % queue->size] = 0;
    barrier();
    volatile_read(queue->avail.index) = before + 1;
    barrier();
    /* Section 2.7.10: with the event index, the doorbell is for the entry the device names. */
    bool ring = features & FEATURE_EVENT_INDEX ? *avail_event(queue) == before
                                               : !(volatile_read(queue->used.flags) & USED_NO_NOTIFY);
    if (ring)
        queue_kick(queue);
}

bool queue_wait(struct queue *queue, u32 *length)
{
    for (u64 since = timestamp(); volatile_read(queue->used.index) == queue->seen; pause())
        if (!within(since, 5))
            return false;
    barrier();
    *length = volatile_read(queue->used.ring[queue->seen % queue->size].length);
    queue->seen++;
    return true;
}
