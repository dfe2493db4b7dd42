/* What the parts of the hostile guest share: the device under attack, and how an attack is told of. */
#pragma once

#include "virtio.h"

struct target {
    struct virtio device;
    const char *name;
    u16 kind, queues;
};
extern struct target *target;
extern struct queue queue;
/* Buffers for attacks; nothing of the guest's own is in reach of them. */
extern u8 area[0x10000] __attribute__((aligned(4096)));

struct attack {
    const char *name;
    void (*run)(void);
};

/* What an attack came to; an attack tells of each of its variants. */
enum outcome { ANSWERED, NEEDS_RESET, IGNORED, SURVIVED, FAILED };

/* Is this attack asked for (`attack=NAME`, or all)? */
bool selected(const char *name);
/* Sees that the device works after a reset and that its neighbour has worked all the time; one line for all that. */
void conclude(const char *name, enum outcome outcome);
/* The same for an attack on the platform. */
void conclude_platform(const char *name, bool survived);
/* Does the neighbour, a second disk, answer with what is on it? */
bool neighbour_works(void);

/* A device that has agreed on `features`, its queue `number` running as `queue`. */
bool begin(u16 number, u64 features);
/* Puts a chain in the available ring, without a kick. */
void publish(u16 head);
void write_descriptor(u16 slot, u64 address, u32 length, u16 flags, u16 next);
/* Waits until the device wants a reset or has used something; the latter must not be waited for too long, as not
   every device answers what makes no sense. */
enum outcome wait_for_outcome(bool patiently);

enum { CHAIN_NEXT = 1, CHAIN_WRITE = 2, CHAIN_INDIRECT = 4 };

/* Pseudo-random numbers, from `seed=` on. */
u64 noise(void);
/* The first address after the RAM below 3 GiB. */
u64 ram_end(void);
void wait_cycles(u64 cycles);

extern const struct attack ring_attacks[], register_attacks[], pci_attacks[], platform_attacks[];
/* `cpus=2`: a second CPU resets the device while this one submits. */
void attack_with_two_cpus(void);
void let_second_cpu_sleep(void);
