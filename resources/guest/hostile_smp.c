/* Two CPUs: one resets the device and plays with its registers while the other one submits requests. */
#include "hostile.h"

enum { TRAMPOLINE = 0x10000 };
enum { APIC_ID = 0x20, APIC_SPURIOUS = 0xf0, APIC_COMMAND = 0x300, APIC_COMMAND_HIGH = 0x310 };

extern const u8 ap_start[], ap_start_end[];
extern void (*volatile ap_entry)(void);
extern void hostile_ap(void);

/* In ring 0, which may be interpreted: no more than stores and loads. */
asm(".text\n"
    "hostile_ap: mov $ap_stack_top, %esp\n"
    "    call second_cpu\n"
    "1:  cli\n"
    "    hlt\n"
    "    jmp 1b\n"
    ".bss\n"
    ".balign 16\n"
    ".skip 0x4000\n"
    "ap_stack_top:\n"
    ".text\n");

static volatile bool started, go, finished;
static volatile u32 rounds;

void second_cpu(void)
{
    started = true;
    for (u32 i = 0;; i++) {
        while (!go) {
            if (finished)
                return;
            rounds = 0;
            pause();
        }
        struct virtio *device = &target->device;
        virtio_write_status(device, 0);
        if (i % 4 == 3)
            virtio_write_status(device, i);
        virtio_write_status(device, 1);
        virtio_write_status(device, 3);
        writel(device->mmio != 0 ? device->mmio + 0x24 : device->common + 8, 1);
        writel(device->mmio != 0 ? device->mmio + 0x20 : device->common + 12, 1);
        virtio_write_status(device, 11);
        virtio_place_queue(device, i % target->queues, queue.size, (u64)queue.descriptors, (u64)&queue.avail,
                           (u64)&queue.used);
        virtio_write_status(device, 15);
        if (i % 3 == 0)
            readl(device->config);
        rounds = rounds + 1;
    }
}

static bool start(void)
{
    if (started)
        return true;
    memcpy((void *)TRAMPOLINE, ap_start, ap_start_end - ap_start);
    ap_entry = hostile_ap;
    writel(LAPIC + APIC_SPURIOUS, 0x1ff);
    for (u32 i = 0; i < 2; i++) {
        writel(LAPIC + APIC_COMMAND_HIGH, 1 << 24);
        writel(LAPIC + APIC_COMMAND, i == 0 ? 0x4500 : 0x4600 | TRAMPOLINE >> 12);
    }
    for (u64 since = timestamp(); !started && within(since, 10);)
        pause();
    return started;
}

void attack_with_two_cpus(void)
{
    if (!selected("two-cpus"))
        return;
    bool fine = start() && begin(0, 0);
    for (u16 i = 0; i < queue.size; i++) {
        bool sends = target->kind == VIRTIO_NET;
        write_descriptor(i, (u64)area + 0x100 * i, 0x100, sends ? 0 : CHAIN_WRITE, 0);
    }
    if (target->kind == VIRTIO_BLOCK)
        for (u16 i = 0; i + 1 < queue.size; i += 2) {
            memset(area + 0x100 * i, 0, 16);
            write_descriptor(i, (u64)area + 0x100 * i, 16, CHAIN_NEXT, i + 1);
            write_descriptor(i + 1, (u64)area + 0x4000, 0x1001, CHAIN_WRITE, 0);
        }
    go = true;
    u64 since = timestamp();
    for (u32 i = 0; fine && (i < 2000 || rounds < 100) && within(since, 5); i++) {
        publish(i * 2 % queue.size);
        queue_kick(&queue);
        if (i % 500 == 0)
            fine = neighbour_works();
    }
    u32 resets = rounds;
    go = false;
    for (since = timestamp(); rounds != 0 && within(since, 5);)
        pause();
    print("%s: %u resets by the other CPU\n", target->name, resets);
    conclude("two-cpus", fine && resets >= 50 && rounds == 0 ? SURVIVED : FAILED);
}

void let_second_cpu_sleep(void)
{
    finished = true;
}
