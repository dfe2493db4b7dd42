/*
 * What a start costs whoever does it: the references of the bench.
 *
 *   floor exec                a static program that writes a byte: fork, exec, a pipe
 *   floor kvm MIB KERNEL      the least a monitor for Linux guests has to ask of KVM: memory slots around the gap
 *                             below 4 GiB, interrupt controllers, timer, CPUID, one vCPU; enters an ELF at its entry
 *                             in 32-bit mode and passes on what it writes to the serial port, until anything else
 *
 * No threads, no devices, no ACPI, no command line, nothing checked that need not be.
 */
#include <elf.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static void fail(const char *what)
{
    perror(what);
    exit(2);
}

static int call(int fd, unsigned long request, void *argument, const char *what)
{
    int result = ioctl(fd, request, argument);
    if (result < 0)
        fail(what);
    return result;
}

static char *map_slot(int vm, unsigned slot, unsigned long addr, unsigned long size)
{
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    struct kvm_userspace_memory_region region = {
        .slot = slot, .guest_phys_addr = addr, .memory_size = size, .userspace_addr = (unsigned long)memory};
    call(vm, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
    return memory;
}

/* A trusted ELF of ours, smaller than the buffer; returns its entry. */
static unsigned long load(const char *path, char *memory)
{
    static char file[1 << 16];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, file, sizeof file) < (long)sizeof(Elf64_Ehdr))
        fail(path);
    const Elf64_Ehdr *header = (const void *)file;
    const Elf64_Phdr *segment = (const void *)(file + header->e_phoff);
    for (int i = 0; i < header->e_phnum; i++, segment++)
        if (segment->p_type == PT_LOAD)
            memcpy(memory + segment->p_paddr, file + segment->p_offset, segment->p_filesz);
    return header->e_entry;
}

static int start_guest(unsigned long mib, const char *kernel)
{
    const unsigned long gap = 3ul << 30, above = 4ul << 30, size = mib << 20;
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        fail("/dev/kvm");
    int vm = call(kvm, KVM_CREATE_VM, NULL, "KVM_CREATE_VM");
    char *memory = map_slot(vm, 0, 0, size < gap ? size : gap);
    if (size > gap)
        map_slot(vm, 1, above, size - gap);
    call(vm, KVM_SET_TSS_ADDR, (void *)0xfffbd000, "KVM_SET_TSS_ADDR");
    call(vm, KVM_CREATE_IRQCHIP, NULL, "KVM_CREATE_IRQCHIP");
    struct kvm_pit_config pit = {0};
    call(vm, KVM_CREATE_PIT2, &pit, "KVM_CREATE_PIT2");

    int vcpu = call(vm, KVM_CREATE_VCPU, NULL, "KVM_CREATE_VCPU");
    size_t run_size = call(kvm, KVM_GET_VCPU_MMAP_SIZE, NULL, "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        fail("mmap of the vCPU");
    static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[256];
    } cpuid = {.head.nent = 256};
    call(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid, "KVM_GET_SUPPORTED_CPUID");
    call(vcpu, KVM_SET_CPUID2, &cpuid, "KVM_SET_CPUID2");

    struct kvm_regs regs = {.rip = load(kernel, memory), .rflags = 2};
    struct kvm_sregs sregs;
    call(vcpu, KVM_GET_SREGS, &sregs, "KVM_GET_SREGS");
    struct kvm_segment flat = {.limit = 0xffffffff, .selector = 0x10, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
    flat.selector = 8;
    flat.type = 11;
    sregs.cs = flat;
    sregs.cr0 |= 1;
    call(vcpu, KVM_SET_SREGS, &sregs, "KVM_SET_SREGS");
    call(vcpu, KVM_SET_REGS, &regs, "KVM_SET_REGS");
    for (;;) {
        call(vcpu, KVM_RUN, NULL, "KVM_RUN");
        if (run->exit_reason != KVM_EXIT_IO || run->io.port != 0x3f8)
            return 0;
        if (write(STDOUT_FILENO, (char *)run + run->io.data_offset, 1) != 1)
            fail("write");
    }
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "exec") == 0)
        return write(STDOUT_FILENO, "T", 1) == 1 ? 0 : 2;
    if (argc == 4 && strcmp(argv[1], "kvm") == 0)
        return start_guest(strtoul(argv[2], NULL, 10), argv[3]);
    fputs("usage: floor exec | floor kvm MIB KERNEL\n", stderr);
    return 2;
}
