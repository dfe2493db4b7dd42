/*
 * From either entry to `start` in ring 3, with IOPL 3.
 *
 * Ring 3, because some hosts interpret a guest's ring 0, slowly and not completely, but run its ring 3 natively.
 * For the same reason every table here is built by the assembler and not at run time.
 */

    .set CODE0, 0x08
    .set DATA0, 0x10
    .set DATA3, 0x18 | 3
    .set CODE3, 0x20 | 3
    .set TASK, 0x28
    .set CODE32, 0x38

    .set EFER, 0xc0000080
    .set EFER_LME, 1 << 8
    .set CR4_PAE, 1 << 5
    .set CR0_PE_PG, 1 << 31 | 1
    .set RFLAGS_IOPL3, 0x3002

/*
 * Exceptions and interrupts: 16 bytes for each vector, from 1 MiB on. The known address is what lets the IDT and
 * the TSS descriptor be constants, as both store addresses in pieces that no relocation can fill in.
 */
    .set VECTORS, 0x100000
    .set VECTOR_COUNT, 48

    .section .vectors, "ax"
    .set vector, 0
    .rept VECTOR_COUNT
    .balign 16
    .if ((1 << vector) & 0x60227d00) == 0 || vector > 31
    push $0                         /* the error code the CPU did not push */
    .endif
    push $vector
    jmp save_and_call
    .set vector, vector + 1
    .endr

    .balign 16
    .set TSS, VECTORS + 16 * VECTOR_COUNT
tss:
    .long 0
    .quad ring0_stack_top           /* RSP0 */
    .fill 22, 4, 0
    .word 0
    .word io_bitmap - . + 102       /* from the TSS's start */
    .set TSS_LIMIT, 0xffff          /* the bitmap is within */

save_and_call:
    .irp register, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
    push %\register
    .endr
    mov %rsp, %rdi
    call trap
    .irp register, r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax
    pop %\register
    .endr
    add $16, %rsp
    iretq

/* `struct entry_state` of runtime.h. */
    .set STATE_REGISTERS, 0
    .set STATE_FLAGS, 128
    .set STATE_CR0, 136
    .set STATE_CR3, 144
    .set STATE_CR4, 152
    .set STATE_EFER, 160
    .set STATE_CS, 168
    .set STATE_DS, 170
    .set STATE_ES, 172
    .set STATE_SS, 174
    .set STATE_TR, 176
    .set STATE_PVH, 178
    .set STATE_SIZE, 184

    .text

/* Stores what was found at entry; `a` is the letter of the mode's registers. Uses only EAX, ECX, EDX. */
    .macro save_state a:req
    .set at, entry_state
    .irp register, ax, cx, dx, bx, sp, bp, si, di
    mov %\a\register, at
    .set at, at + 8
    .endr
    mov $ring0_stack_top, %esp
    pushf
    pop %\a\()ax
    mov %\a\()ax, entry_state + STATE_FLAGS
    .irp register, 0, 3, 4
    mov %cr\register, %\a\()ax
    .ifc \register, 0
    mov %\a\()ax, entry_state + STATE_CR0
    .else
    mov %\a\()ax, entry_state + STATE_CR0 + 8 * (\register - 2)
    .endif
    .endr
    mov $EFER, %ecx
    rdmsr
    mov %eax, entry_state + STATE_EFER
    mov %edx, entry_state + STATE_EFER + 4
    mov %cs, entry_state + STATE_CS
    mov %ds, entry_state + STATE_DS
    mov %es, entry_state + STATE_ES
    mov %ss, entry_state + STATE_SS
    str entry_state + STATE_TR
    .endm

    .globl entry32, entry64

    .code32
entry32:
    save_state e
    movb $1, entry_state + STATE_PVH
    /* EAX, ECX, EDX are free. */
    .globl enter_long_mode
enter_long_mode:
    lgdt gdt_pointer
    mov %cr4, %eax
    or $CR4_PAE, %eax
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $EFER, %ecx
    rdmsr
    or $EFER_LME, %eax
    wrmsr
    mov %cr0, %eax
    or $CR0_PE_PG, %eax
    mov %eax, %cr0
    ljmp $CODE0, $long_mode

    .code64
entry64:
    save_state r
    .set at, entry_state + 64
    .irp register, r8, r9, r10, r11, r12, r13, r14, r15
    mov %\register, at
    .set at, at + 8
    .endr
    lgdt gdt_pointer
    mov $pml4, %eax
    mov %rax, %cr3
    push $CODE0
    push $long_mode
    lretq

/* Ring 0, our GDT and page tables; every CPU comes through here, the first one with `ap_entry` still zero. */
long_mode:
    mov $DATA0, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    lidt idt_pointer
    mov ap_entry, %rax
    test %rax, %rax
    jnz 1f
    mov $TASK, %eax
    ltr %ax
    mov $ring0_stack_top, %esp
    push $DATA3
    push $ring3_stack_top
    push $RFLAGS_IOPL3
    push $CODE3
    push $start
    iretq
1:  jmp *%rax

    .section .tables, "aw"
    .balign 0x1000
/* 4 GiB, identity mapped, open to ring 3. `map_device` of runtime.c adds to it. */
    .globl pml4
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad directories + 0x0007, directories + 0x1007, directories + 0x2007, directories + 0x3007
    .fill 508, 8, 0
directories:
    .set page, 0x87
    .rept 2048
    .quad page
    .set page, page + 0x200000
    .endr

gdt:
    .quad 0
    .quad 0x00af9b000000ffff        /* CODE0 */
    .quad 0x00cf93000000ffff        /* DATA0 */
    .quad 0x00cff3000000ffff        /* DATA3 */
    .quad 0x00affb000000ffff        /* CODE3 */
    .word TSS_LIMIT, TSS & 0xffff   /* TASK */
    .byte TSS >> 16, 0x89, 0, 0
    .quad 0
    .quad 0x00cf9b000000ffff        /* CODE32, on an AP's way from real mode */
gdt_end:

idt:
    .set vector, 0
    .rept VECTOR_COUNT
    .word (VECTORS + 16 * vector) & 0xffff, CODE0, 0x8e00, VECTORS >> 16
    .quad 0
    .set vector, vector + 1
    .endr
idt_end:

    .balign 8
    .globl gdt_pointer, gdt
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word idt_end - idt - 1
    .quad idt

    .balign 8
    .globl entry_state, ap_entry
entry_state:
    .fill STATE_SIZE, 1, 0
/* Where the other CPUs go from `long_mode`. */
ap_entry:
    .quad 0

/* All zero: ring 3 may use every port. IOPL 3 says the same, but there are hosts whose IRET drops it. */
    .section .bss.near, "aw", @nobits
io_bitmap:
    .skip 0x2000

    .bss
    .balign 16
    .skip 0x4000
ring0_stack_top:
    .skip 0x8000
ring3_stack_top:

    .section .note.GNU-stack, "", @progbits
