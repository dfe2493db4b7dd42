/* Linked into the flavour that is entered over PVH: XEN_ELFNOTE_PHYS32_ENTRY names the 32-bit entry. */
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long entry32

    .section .note.GNU-stack, "", @progbits
