/*
 * Everything an attacker would try with a device, on every device, over either transport (`transport=mmio`). Needs two
 * disks: the first one is attacked, the second one has to work all the time. After each attack the device under it
 * has to work, once it is reset. One line for each: `ok DEVICE ATTACK OUTCOME`.
 *
 *   attack=NAME  this one only     seed=N  of what is random     noise=N  random accesses for each attack of that kind
 *   end=halt     stays there at the end
 *   cpus=2       with a second CPU that resets devices under way
 *   platform=1   with sweeps over ports and the address space; full=1: over every single port
 */
#include "hostile.h"

struct target *target;
struct queue queue;
u8 area[0x10000] __attribute__((aligned(4096)));

static struct target targets[] = {
    {.name = "block", .kind = VIRTIO_BLOCK, .queues = 1},
    {.name = "net", .kind = VIRTIO_NET, .queues = 2},
    {.name = "rng", .kind = VIRTIO_RNG, .queues = 1},
};
static struct virtio neighbour;
static struct queue neighbour_queue;
static u8 sector[512], status;
static struct {
    u32 type, reserved;
    u64 sector;
} header;

u64 noise(void)
{
    static u64 state;
    if (state == 0)
        state = 0x9e3779b97f4a7c15 * (option_number("seed", 1) + 1);
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

u64 ram_end(void)
{
    u64 end = 0;
    for (u32 i = 0; i < boot.ranges; i++)
        if (boot.map[i].type == 1 && boot.map[i].start < BOOT_MARK && boot.map[i].start + boot.map[i].size > end)
            end = boot.map[i].start + boot.map[i].size;
    return end;
}

void wait_cycles(u64 cycles)
{
    for (u64 since = timestamp(); timestamp() - since < cycles;)
        pause();
}

bool selected(const char *name)
{
    return option("attack") == NULL || option_is("attack", "all") || option_is("attack", name);
}

/* --- Devices that work --- */

static bool read_sector(struct queue *queue)
{
    struct piece pieces[] = {{&header, sizeof(header), false}, {sector, sizeof(sector), true}, {&status, 1, true}};
    u32 length;
    memset(&header, 0, sizeof(header));
    memset(sector, 0, sizeof(sector));
    status = 0xff;
    queue_submit(queue, pieces, 3);
    return queue_wait(queue, &length) && status == 0 && length == sizeof(sector) + 1;
}

/* The disks are full of 0xa5. */
bool neighbour_works(void)
{
    if (!read_sector(&neighbour_queue))
        return false;
    for (u32 i = 0; i < sizeof(sector); i++)
        if (sector[i] != 0xa5)
            return false;
    return !(virtio_status(&neighbour) & STATUS_NEEDS_RESET);
}

static bool works(void)
{
    static u8 bytes[12 + 60];
    u32 length;
    if (target->kind == VIRTIO_BLOCK)
        return begin(0, 0) && read_sector(&queue);
    bool sends = target->kind == VIRTIO_NET;
    struct piece piece = {bytes, sizeof(bytes), !sends};
    memset(bytes, 0, sizeof(bytes));
    if (!begin(sends ? 1 : 0, 0))
        return false;
    queue_submit(&queue, &piece, 1);
    return queue_wait(&queue, &length) && length == (sends ? 0 : sizeof(bytes));
}

/* --- Reports --- */

static char line[128];

static const char *join(const char *const words[], u32 count)
{
    u32 at = 0;
    for (u32 i = 0; i < count; i++) {
        for (const char *word = words[i]; *word != 0 && at < sizeof(line) - 2; word++)
            line[at++] = *word;
        line[at++] = i + 1 < count ? ' ' : 0;
    }
    return line;
}

static const char *const outcomes[] = {
    [ANSWERED] = "answered", [NEEDS_RESET] = "needs-reset", [IGNORED] = "ignored", [SURVIVED] = "survived",
    [FAILED] = "failed",
};

void conclude(const char *name, enum outcome outcome)
{
    const char *words[] = {target->name, name, outcomes[outcome]};
    bool others = neighbour_works();
    bool again = works();
    const char *text = join(words, 3);
    check(others && again && outcome != FAILED, text, "the other disk %s, this device %s", others ? "works" : "fails",
          again ? "works again" : "does not work after a reset");
}

void conclude_platform(const char *name, bool survived)
{
    const char *words[] = {"platform", name, "survived"};
    check(neighbour_works() && survived, join(words, 3), "the disk works: %u", neighbour_works());
}

/* --- Rings --- */

bool begin(u16 number, u64 features)
{
    if (!virtio_negotiate(&target->device, features) || !virtio_queue(&target->device, number, &queue))
        return false;
    virtio_run(&target->device);
    return (virtio_status(&target->device) & STATUS_DRIVER_OK) != 0;
}

void publish(u16 head)
{
    u16 index = queue.avail.index;
    queue.avail.ring[index % queue.size] = head;
    barrier();
    volatile_read(queue.avail.index) = index + 1;
    barrier();
}

void write_descriptor(u16 slot, u64 address, u32 length, u16 flags, u16 next)
{
    queue.descriptors[slot] = (struct descriptor){address, length, flags, next};
}

enum outcome wait_for_outcome(bool patiently)
{
    for (u64 since = timestamp(); patiently ? within(since, 5) : timestamp() - since < 20000000; pause()) {
        if (virtio_status(&target->device) & STATUS_NEEDS_RESET)
            return NEEDS_RESET;
        if (volatile_read(queue.used.index) != 0)
            return ANSWERED;
    }
    return IGNORED;
}

static void run(const struct attack *attacks)
{
    for (; attacks->name != NULL; attacks++)
        if (selected(attacks->name))
            attacks->run();
}

void main(void)
{
    bool ready = virtio_find(&neighbour, VIRTIO_BLOCK, 1) && virtio_negotiate(&neighbour, 0) &&
                 virtio_queue(&neighbour, 0, &neighbour_queue);
    virtio_run(&neighbour);
    if (!check(ready && neighbour_works(), "neighbour", "there is no second disk full of 0xa5"))
        return summary();
    for (u32 i = 0; i < sizeof(targets) / sizeof(targets[0]); i++) {
        target = &targets[i];
        if (!virtio_find(&target->device, target->kind, 0)) {
            skipped(target->name, "not there");
            continue;
        }
        u64 since = timestamp();
        run(ring_attacks);
        run(register_attacks);
        if (target->device.mmio == 0)
            run(pci_attacks);
        print("%s: %lu Mcycles\n", target->name, (timestamp() - since) / 1000000);
    }
    /* Last, as a second CPU takes its time from the first one. */
    for (u32 i = 0; option_number("cpus", 1) > 1 && i < sizeof(targets) / sizeof(targets[0]); i++) {
        target = &targets[i];
        if (target->device.notify != 0)
            attack_with_two_cpus();
    }
    let_second_cpu_sleep();
    if (option_number("platform", 0))
        run(platform_attacks);
    summary();
    if (option_is("end", "halt"))
        halt();
}
