/*
 * What an application processor runs: from real mode to long mode and, with a note that it was here, to sleep.
 * The first part is copied below 1 MiB.
 */
    .set DATA0, 0x10
    .set CODE32, 0x38
    .set APIC_BASE, 0x1b
    .set APIC_BASE_X2APIC, 1 << 10
    .set X2APIC_ID, 0x802
    .set XAPIC_ID, 0xfee00020

    .section .rodata
    .globl ap_start, ap_start_end
    .code16
ap_start:
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl (near_gdt_pointer - ap_start)
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmpl $CODE32, $protected
    .balign 4
    /* A copy, as `gdt_pointer` is out of reach of a real-mode address. */
near_gdt_pointer:
    .word 0x3f
    .long gdt
ap_start_end:

    .text
    .code32
protected:
    mov $DATA0, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    jmp enter_long_mode

    .code64
    .globl ap_main, ap_seen
ap_main:
    mov $APIC_BASE, %ecx
    rdmsr
    test $APIC_BASE_X2APIC, %eax
    jz 1f
    mov $X2APIC_ID, %ecx
    rdmsr
    jmp 2f
1:  mov $XAPIC_ID, %edx
    mov (%rdx), %eax
    shr $24, %eax
2:  and $0x3ff, %eax
    movb $1, ap_seen(%rax)
3:  cli
    hlt
    jmp 3b

    .bss
ap_seen:
    .skip 0x400

    .section .note.GNU-stack, "", @progbits
