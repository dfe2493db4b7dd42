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

bool virtio_find(struct virtio *device, u16 kind, u32 nth)
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

/* --- The common configuration (section 4.1.4.3) --- */

enum {
    DEVICE_FEATURE_SELECT = 0,
    DEVICE_FEATURE = 4,
    DRIVER_FEATURE_SELECT = 8,
    DRIVER_FEATURE = 12,
    MSIX_CONFIG = 16,
    DEVICE_STATUS = 20,
    QUEUE_SELECT = 22,
    QUEUE_SIZE = 24,
    QUEUE_MSIX_VECTOR = 26,
    QUEUE_ENABLE = 28,
    QUEUE_NOTIFY_OFFSET = 30,
    QUEUE_DESCRIPTORS = 32,
    QUEUE_DRIVER = 40,
    QUEUE_DEVICE = 48,
    NO_VECTOR = 0xffff,
};

u8 virtio_status(const struct virtio *device)
{
    return readb(device->common + DEVICE_STATUS);
}

static void set_status(const struct virtio *device, u8 bits)
{
    writeb(device->common + DEVICE_STATUS, virtio_status(device) | bits);
}

bool virtio_negotiate(struct virtio *device, u64 wanted)
{
    u64 common = device->common;
    writeb(common + DEVICE_STATUS, 0);
    for (u64 since = timestamp(); virtio_status(device) != 0; pause())
        if (!within(since, 5))
            return false;
    set_status(device, STATUS_ACKNOWLEDGE);
    set_status(device, STATUS_DRIVER);
    device->offered = 0;
    for (u32 half = 0; half < 2; half++) {
        writel(common + DEVICE_FEATURE_SELECT, half);
        device->offered |= (u64)readl(common + DEVICE_FEATURE) << 32 * half;
    }
    device->features = device->offered & (wanted | FEATURE_VERSION_1);
    for (u32 half = 0; half < 2; half++) {
        writel(common + DRIVER_FEATURE_SELECT, half);
        writel(common + DRIVER_FEATURE, device->features >> 32 * half);
    }
    set_status(device, STATUS_FEATURES_OK);
    return virtio_status(device) & STATUS_FEATURES_OK;
}

/* Two halves: the registers are 64 bits wide, but drivers access them so (section 4.1.3.1). */
static void write_address(u64 at, const void *address)
{
    writel(at, (u64)address);
    writel(at + 4, (u64)address >> 32);
}

bool virtio_queue(struct virtio *device, u16 number, struct queue *queue)
{
    u64 common = device->common;
    memset(queue, 0, sizeof(*queue));
    writew(common + QUEUE_SELECT, number);
    u16 size = readw(common + QUEUE_SIZE);
    if (size == 0)
        return false;
    if (size > QUEUE_MAX) {
        size = QUEUE_MAX;
        writew(common + QUEUE_SIZE, size);
    }
    queue->device = device;
    queue->number = number;
    queue->size = size;
    queue->doorbell = device->notify + readw(common + QUEUE_NOTIFY_OFFSET) * device->notify_multiplier;
    writew(common + QUEUE_MSIX_VECTOR, NO_VECTOR);
    write_address(common + QUEUE_DESCRIPTORS, queue->descriptors);
    write_address(common + QUEUE_DRIVER, &queue->avail);
    write_address(common + QUEUE_DEVICE, &queue->used);
    writew(common + QUEUE_ENABLE, 1);
    return true;
}

void virtio_run(struct virtio *device)
{
    writew(device->common + MSIX_CONFIG, NO_VECTOR);
    set_status(device, STATUS_DRIVER_OK);
}

/* --- Rings --- */

enum { DESCRIPTOR_NEXT = 1, DESCRIPTOR_WRITE = 2, DESCRIPTOR_INDIRECT = 4, USED_NO_NOTIFY = 1 };

#define barrier() asm volatile("mfence" : : : "memory")
#define volatile_read(place) (*(volatile typeof(place) *)&(place))

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
        writew(queue->doorbell, queue->number);
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
