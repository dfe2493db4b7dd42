/* PCI configuration space, and a polling driver for modern virtio devices over PCI and MMIO (virtio 1.2, section 4). */
#pragma once

#include "runtime.h"

/* --- PCI, bus 0, function 0 --- */

#define PCI_ACCESS(type, suffix)                                               \
    type pci_read##suffix(u8 slot, u8 offset);                                 \
    void pci_write##suffix(u8 slot, u8 offset, type value);
PCI_ACCESS(u8, b)
PCI_ACCESS(u16, w)
PCI_ACCESS(u32, l)

/* Address of a register in the memory-mapped configuration space. */
static inline u64 ecam(u8 slot, u16 offset)
{
    return ECAM + ((u64)slot << 15) + offset;
}

/* Address of a memory BAR; gives it one in the 32-bit window if nobody has. */
u64 pci_bar(u8 slot, u8 bar);

/* --- Virtio --- */

enum { VIRTIO_NET = 1, VIRTIO_BLOCK = 2, VIRTIO_RNG = 4 };

#define FEATURE(bit) (1ull << (bit))
#define FEATURE_INDIRECT FEATURE(28)
#define FEATURE_EVENT_INDEX FEATURE(29)
#define FEATURE_VERSION_1 FEATURE(32)

enum {
    STATUS_ACKNOWLEDGE = 1,
    STATUS_DRIVER = 2,
    STATUS_DRIVER_OK = 4,
    STATUS_FEATURES_OK = 8,
    STATUS_NEEDS_RESET = 64,
};

/* `transport=mmio` on the command line: a page of registers each, from here on. */
#define VIRTIO_MMIO 0xc0002000ull
#define VIRTIO_MMIO_SIZE 0x1000ull

struct virtio {
    u8 slot;
    u64 mmio; /* its registers, if it is not behind PCI */
    u64 common, notify, isr, config; /* addresses of its register blocks */
    u32 notify_multiplier;
    u64 offered, features; /* bits the device offers; bits agreed on */
};

enum { QUEUE_MAX = 64 };

struct descriptor {
    u64 address;
    u32 length;
    u16 flags, next;
};

struct queue {
    struct descriptor descriptors[QUEUE_MAX] __attribute__((aligned(16)));
    struct {
        u16 flags, index, ring[QUEUE_MAX], used_event;
    } avail __attribute__((aligned(2)));
    struct {
        u16 flags, index;
        struct {
            u32 id, length;
        } ring[QUEUE_MAX];
        u16 avail_event;
    } used __attribute__((aligned(4)));
    struct descriptor indirect[QUEUE_MAX] __attribute__((aligned(16)));
    struct virtio *device;
    u16 number, size;
    u64 doorbell;
    u16 seen; /* used entries taken so far */
};

/* A piece of a request; the device may write to it if `device_writes`. */
struct piece {
    void *at;
    u32 length;
    bool device_writes;
};

/* The `nth` device of a kind, its register blocks found. */
bool virtio_find(struct virtio *device, u16 kind, u32 nth);
u8 virtio_status(const struct virtio *device);
/* Writes the register, whatever it was. */
void virtio_write_status(const struct virtio *device, u8 value);
/* Writes zero and waits until it is there; false after five seconds. */
bool virtio_reset(const struct virtio *device);
/* Resets the device and agrees on those of the wanted features that it offers. */
bool virtio_negotiate(struct virtio *device, u64 wanted);
/* Sets up a queue, of the device's own size if that is less than QUEUE_MAX. */
bool virtio_queue(struct virtio *device, u16 number, struct queue *queue);
/* Enables a queue of whatever size at whatever addresses. */
void virtio_place_queue(struct virtio *device, u16 number, u32 size, u64 descriptors, u64 avail, u64 used);
void virtio_run(struct virtio *device);

#define barrier() asm volatile("mfence" : : : "memory")
#define volatile_read(place) (*(volatile typeof(place) *)&(place))

/* Rings the doorbell. */
void queue_kick(const struct queue *queue);
/* Puts a request in the ring (as an indirect table if that was agreed on) and rings the doorbell if the device asks
   for it. */
void queue_submit(struct queue *queue, const struct piece *pieces, u32 count);
/* Waits for the device to be done with one request; `length`: how much it wrote. False after five seconds. */
bool queue_wait(struct queue *queue, u32 *length);
