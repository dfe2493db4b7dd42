/* Rings that break the rules of virtio 1.2, section 2.7. */
#include "hostile.h"

#define AREA ((u64)area)
#define TABLE ((u64)queue.indirect)

static void write_indirect(u16 slot, u64 address, u32 length, u16 flags, u16 next)
{
    queue.indirect[slot] = (struct descriptor){address, length, flags, next};
}

static void loop_of_one(void) { write_descriptor(0, AREA, 16, CHAIN_NEXT, 0); }
static void loop_of_two(void)
{
    write_descriptor(0, AREA, 16, CHAIN_NEXT, 1);
    write_descriptor(1, AREA, 16, CHAIN_NEXT, 0);
}
static void loop_of_all(void)
{
    for (u16 i = 0; i < queue.size; i++)
        write_descriptor(i, AREA, 1, CHAIN_NEXT | CHAIN_WRITE, (i + 1) % queue.size);
}
static void next_outside(void) { write_descriptor(0, AREA, 16, CHAIN_NEXT, queue.size); }
static void next_far_outside(void) { write_descriptor(0, AREA, 16, CHAIN_NEXT | CHAIN_WRITE, 0xffff); }
static void head_outside(void) { queue.avail.ring[0] = 0xffff; }
static void after_memory(void) { write_descriptor(0, ram_end(), 16, 0, 0); }
static void over_the_end(void) { write_descriptor(0, ram_end() - 8, 16, CHAIN_WRITE, 0); }
static void longer_than_memory(void) { write_descriptor(0, 0, ~0u, CHAIN_WRITE, 0); }
static void wrapping(void) { write_descriptor(0, ~0ull - 7, 16, CHAIN_WRITE, 0); }
static void wrapping_far(void) { write_descriptor(0, ~0ull - 7, ~0u, CHAIN_WRITE, 0); }
static void on_registers(void)
{
    u64 registers = target->device.mmio != 0 ? target->device.mmio : target->device.common;
    write_descriptor(0, registers, 64, CHAIN_WRITE, 0);
}
static void on_the_apic(void) { write_descriptor(0, LAPIC, 16, CHAIN_WRITE, 0); }
static void readable_after_writable(void)
{
    write_descriptor(0, AREA, 16, CHAIN_WRITE | CHAIN_NEXT, 1);
    write_descriptor(1, AREA, 16, 0, 0);
}
static void indirect_in_indirect(void)
{
    write_descriptor(0, TABLE, 16, CHAIN_INDIRECT, 0);
    write_indirect(0, TABLE + 16, 16, CHAIN_INDIRECT, 0);
    write_indirect(1, AREA, 16, 0, 0);
}
static void indirect_in_itself(void)
{
    write_descriptor(0, TABLE, 16, CHAIN_INDIRECT, 0);
    write_indirect(0, TABLE, 16, CHAIN_INDIRECT, 0);
}
static void indirect_empty(void) { write_descriptor(0, TABLE, 0, CHAIN_INDIRECT, 0); }
static void indirect_and_a_half(void)
{
    write_descriptor(0, TABLE, 24, CHAIN_INDIRECT, 0);
    write_indirect(0, AREA, 16, CHAIN_WRITE, 0);
}
static void indirect_after_memory(void) { write_descriptor(0, ram_end(), 16, CHAIN_INDIRECT, 0); }
static void indirect_wrapping(void) { write_descriptor(0, ~0ull - 15, 32, CHAIN_INDIRECT, 0); }
static void indirect_huge(void) { write_descriptor(0, 0, 0xfffffff0, CHAIN_INDIRECT, 0); }
static void indirect_too_long(void)
{
    for (u16 i = 0; i < 300; i++)
        ((struct descriptor *)area)[i] = (struct descriptor){AREA, 1, CHAIN_NEXT | CHAIN_WRITE, i + 1};
    ((struct descriptor *)area)[300] = (struct descriptor){AREA, 1, CHAIN_WRITE, 0};
    write_descriptor(0, AREA, 301 * 16, CHAIN_INDIRECT, 0);
}
static void indirect_loop(void)
{
    write_descriptor(0, TABLE, 32, CHAIN_INDIRECT, 0);
    write_indirect(0, AREA, 16, CHAIN_NEXT | CHAIN_WRITE, 1);
    write_indirect(1, AREA, 16, CHAIN_NEXT | CHAIN_WRITE, 0);
}
static void index_jump(void) { queue.avail.index = queue.size; }
static void index_back(void) { queue.avail.index = 0xfffd; }

/* These may be answered, as they break no rule or only one that nobody has to notice. */
static void no_byte(void) { write_descriptor(0, AREA, 0, 0, 0); }
static void no_byte_writable(void) { write_descriptor(0, ~0ull, 0, CHAIN_WRITE, 0); }
static void whole_queue(void)
{
    loop_of_all();
    queue.descriptors[queue.size - 1].flags = CHAIN_WRITE;
}
static void over_the_rings(void) { write_descriptor(0, (u64)&queue, sizeof(queue), CHAIN_WRITE, 0); }
static void over_the_used_index(void) { write_descriptor(0, (u64)&queue.used, 4, CHAIN_WRITE, 0); }
static void all_of_memory(void) { write_descriptor(0, (u64)area, ram_end() - (u64)area, 0, 0); }
static void indirect_with_next(void)
{
    write_descriptor(0, TABLE, 16, CHAIN_INDIRECT | CHAIN_NEXT, 1);
    write_descriptor(1, AREA, 16, 0, 0);
    write_indirect(0, AREA, 16, 0, 0);
}
static void unknown_flags(void) { write_descriptor(0, AREA, 16, 0xfff8, 0); }
static void same_chain_often(void)
{
    write_descriptor(0, AREA, 16, CHAIN_WRITE, 0);
    queue.avail.index = queue.size - 1;
}

static const struct ring_attack {
    const char *name;
    void (*set_up)(void);
    bool breaks;
} rings[] = {
    {"loop-of-one", loop_of_one, true},
    {"loop-of-two", loop_of_two, true},
    {"loop-of-all", loop_of_all, true},
    {"next-outside", next_outside, true},
    {"next-far-outside", next_far_outside, true},
    {"after-memory", after_memory, true},
    {"over-the-end", over_the_end, true},
    {"longer-than-memory", longer_than_memory, true},
    {"wrapping", wrapping, true},
    {"wrapping-far", wrapping_far, true},
    {"on-registers", on_registers, true},
    {"on-the-apic", on_the_apic, true},
    {"readable-after-writable", readable_after_writable, true},
    {"indirect-in-indirect", indirect_in_indirect, true},
    {"indirect-in-itself", indirect_in_itself, true},
    {"indirect-empty", indirect_empty, true},
    {"indirect-and-a-half", indirect_and_a_half, true},
    {"indirect-after-memory", indirect_after_memory, true},
    {"indirect-wrapping", indirect_wrapping, true},
    {"indirect-huge", indirect_huge, true},
    {"indirect-too-long", indirect_too_long, true},
    {"indirect-loop", indirect_loop, true},
    {"index-jump", index_jump, true},
    {"index-back", index_back, true},
    {"no-byte", no_byte, false},
    {"no-byte-writable", no_byte_writable, false},
    {"whole-queue", whole_queue, false},
    {"over-the-rings", over_the_rings, false},
    {"over-the-used-index", over_the_used_index, false},
    {"all-of-memory", all_of_memory, false},
    {"indirect-with-next", indirect_with_next, false},
    {"unknown-flags", unknown_flags, false},
    {"same-chain-often", same_chain_often, false},
};

static void attack_ring(const struct ring_attack *attack, u16 number, u64 features)
{
    enum outcome outcome = FAILED;
    if (begin(number, features)) {
        attack->set_up();
        publish(0);
        queue_kick(&queue);
        outcome = wait_for_outcome(attack->breaks);
        if (attack->breaks && outcome != NEEDS_RESET)
            outcome = FAILED;
    }
    conclude(attack->name, outcome);
}

static void every_ring(void)
{
    for (u32 i = 0; i < sizeof(rings) / sizeof(rings[0]); i++)
        for (u16 number = 0; number < target->queues; number++)
            attack_ring(&rings[i], number, i % 2 ? FEATURE_INDIRECT | FEATURE_EVENT_INDEX : FEATURE_INDIRECT);
}

static void outside_head(void)
{
    for (u16 number = 0; number < target->queues; number++) {
        enum outcome outcome = FAILED;
        if (begin(number, 0)) {
            head_outside();
            volatile_read(queue.avail.index) = 1;
            queue_kick(&queue);
            outcome = wait_for_outcome(true);
        }
        conclude("head-outside", outcome == NEEDS_RESET ? outcome : FAILED);
    }
}

/* Rings that are nowhere: the device must not start, or start and find nothing. */
static void places(void)
{
    const u64 good = (u64)area, end = ram_end();
    const u64 bad[] = {end - 16, end, BOOT_MARK, LAPIC, 1ull << 40, ~0ull - 15, ~0ull, good + 1};
    const u32 sizes[] = {0, 3, 512, 0x8000, 0xffff, 0x10001};
    enum outcome outcome = NEEDS_RESET;
    memset(area, 0, sizeof(area));
    for (u32 i = 0; i < 24 + 6; i++) {
        u64 at[] = {good, good + 0x4000, good + 0x8000};
        u32 size = 16;
        if (i < 24)
            at[i % 3] = bad[i / 3];
        else
            size = sizes[i - 24];
        if (!virtio_negotiate(&target->device, 0))
            outcome = FAILED;
        virtio_place_queue(&target->device, 0, size, at[0], at[1], at[2]);
        virtio_run(&target->device);
        if (!(virtio_status(&target->device) & STATUS_NEEDS_RESET) && size != 0x10001) {
            print("size %u at %lx, %lx, %lx is taken\n", size, at[0], at[1], at[2]);
            outcome = FAILED;
        }
    }
    conclude("rings-nowhere", outcome);
}

/* Descriptors, available and used ring on top of each other: whatever comes of it, it ends. */
static void overlapping(void)
{
    memset(area, 0, sizeof(area));
    for (u32 i = 0; i < sizeof(area) / 2; i++)
        ((u16 *)area)[i] = noise();
    if (virtio_negotiate(&target->device, FEATURE_INDIRECT)) {
        virtio_place_queue(&target->device, 0, 16, (u64)area, (u64)area, (u64)area);
        virtio_run(&target->device);
        writel(target->device.notify, 0);
        wait_cycles(10000000);
    }
    conclude("rings-overlap", SURVIVED);
}

/* Rings, descriptors and buffers of noise, changed while the device reads them. */
static void random_rings(void)
{
    u64 rounds = option_number("noise", 2000) / 20;
    for (u64 round = 0; round < rounds; round++) {
        if (!begin(noise() % target->queues, noise() % 2 ? FEATURE_INDIRECT | FEATURE_EVENT_INDEX : 0))
            return conclude("random-rings", FAILED);
        for (u32 i = 0; i < 64; i++) {
            u64 r = noise();
            u64 address = r % 16 == 0 ? noise() : AREA + noise() % sizeof(area);
            u32 length = r / 16 % 16 == 0 ? noise() : noise() % 2048;
            write_descriptor(i, address, length, noise() % 8 ? noise() % 4 : noise(), noise() % 64);
            /* Sometimes a plausible header of a block request. */
            *(u64 *)(area + noise() % (sizeof(area) / 16) * 16) = noise() % 16;
            publish(noise() % 64);
            if (i % 8 == 7)
                queue_kick(&queue);
        }
        for (u32 i = 0; i < 100; i++)
            queue.descriptors[noise() % 64].length = noise();
    }
    conclude("random-rings", SURVIVED);
}

const struct attack ring_attacks[] = {
    {"rings", every_ring},       {"head-outside", outside_head},  {"places", places},
    {"overlapping", overlapping}, {"random-rings", random_rings}, {NULL, NULL},
};
