/* Registers: the status, the queues', every offset in every width, resets with requests under way. */
#include "hostile.h"

/* Where the device's registers are, and how far they go. */
static u64 registers(void) { return target->device.mmio != 0 ? target->device.mmio : target->device.common & ~0x7fffull; }
static u64 registers_size(void) { return target->device.mmio != 0 ? VIRTIO_MMIO_SIZE : 0x8000; }

static void status_abuse(void)
{
    const struct virtio *device = &target->device;
    bool fine = true;
    for (u32 value = 1; value < 256; value++) {
        virtio_write_status(device, value);
        fine = fine && !(virtio_status(device) & STATUS_DRIVER_OK && !(virtio_status(device) & STATUS_FEATURES_OK));
    }
    for (u32 value = 1; value < 256; value++) {
        fine = fine && virtio_reset(device);
        virtio_write_status(device, value);
        virtio_write_status(device, value ^ 0xff);
    }
    for (u32 i = 0; i < 1000; i++)
        virtio_write_status(device, noise());
    conclude("status-abuse", fine ? SURVIVED : FAILED);
}

/* All queues there may be, enabled, moved and enabled again while they run. */
static void queue_abuse(void)
{
    if (begin(0, 0))
        for (u32 i = 0; i < 300; i++)
            virtio_place_queue(&target->device, i < 100 ? i : noise(), noise(), (u64)area, (u64)area + 0x4000, noise());
    conclude("queue-abuse", SURVIVED);
}

static void access(u64 at, u32 width, bool write)
{
    u64 value = noise();
    switch (width * 2 + write) {
    case 0: readb(at); break;
    case 1: writeb(at, value); break;
    case 2: readw(at); break;
    case 3: writew(at, value); break;
    case 4: readl(at); break;
    case 5: writel(at, value); break;
    case 6: readq(at); break;
    default: writeq(at, value);
    }
}

/* Every width at every offset, aligned or not: all of a page, or what there is at the start and end of each region. */
static void register_sweep(void)
{
    for (u32 write = 0; write < 2; write++)
        for (u64 at = 0; at < registers_size(); at++) {
            if (at % 0x1000 >= 0x80 && at % 0x1000 < 0xff0)
                continue;
            for (u32 width = 0; width < 4; width++)
                if (at + (1 << width) <= registers_size())
                    access(registers() + at, width, write);
        }
    conclude("register-sweep", SURVIVED);
}

/* Random writes, mostly to where something is, while a queue runs. */
static void register_noise(void)
{
    u64 rounds = option_number("noise", 2000);
    begin(0, FEATURE_INDIRECT);
    for (u64 i = 0; i < rounds; i++) {
        u64 at = noise() % 4 ? noise() % 0x100 : noise() % (registers_size() - 8);
        access(registers() + at, noise() % 4, noise() % 4 != 0);
        if (i % 200 == 0)
            begin(noise() % target->queues, noise());
    }
    conclude("register-noise", SURVIVED);
}

static void kicks(void)
{
    const struct virtio *device = &target->device;
    virtio_reset(device);
    for (u32 i = 0; i < 100; i++)
        writel(device->notify, i);
    if (begin(0, 0))
        for (u32 i = 0; i < 20000; i++)
            queue_kick(&queue);
    for (u32 i = 0; i < 1000; i++)
        writel(device->notify + (device->mmio != 0 ? 0 : noise() % 0x3f8 * 4), noise());
    conclude("kicks-for-nothing", SURVIVED);
}

/* The device must not touch memory after it says that it is reset. */
static void reset_under_way(void)
{
    enum outcome outcome = SURVIVED;
    const u32 rounds = 200;
    for (u32 round = 0; round < rounds && outcome != FAILED; round++) {
        if (!begin(target->kind == VIRTIO_NET ? round % 2 : 0, 0)) {
            outcome = FAILED;
            break;
        }
        /* A block request of the header in `area` and the rest of it; for others, buffers. */
        memset(area, 0, 32);
        write_descriptor(0, (u64)area, 16, target->kind == VIRTIO_BLOCK ? CHAIN_NEXT : CHAIN_WRITE, 1);
        write_descriptor(1, (u64)area + 512, 0x8000, CHAIN_WRITE | CHAIN_NEXT, 2);
        write_descriptor(2, (u64)area + 0xff00, 1, CHAIN_WRITE, 0);
        for (u32 i = 0; i < 32; i++)
            publish(0);
        queue_kick(&queue);
        wait_cycles(noise() % 200000);
        if (!virtio_reset(&target->device))
            outcome = FAILED;
        u16 used = volatile_read(queue.used.index);
        memset(area, 0x5a, sizeof(area));
        wait_cycles(300000);
        for (u32 i = 0; i < sizeof(area); i += 64)
            if (volatile_read(area[i]) != 0x5a)
                outcome = FAILED;
        if (volatile_read(queue.used.index) != used)
            outcome = FAILED;
    }
    conclude("reset-under-way", outcome);
}

const struct attack register_attacks[] = {
    {"status-abuse", status_abuse},     {"queue-abuse", queue_abuse},       {"register-sweep", register_sweep},
    {"register-noise", register_noise}, {"kicks-for-nothing", kicks},       {"reset-under-way", reset_under_way},
    {NULL, NULL},
};
