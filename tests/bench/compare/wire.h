// What `net` in the guest and `peer` on its other side agree on. A job is a TCP connection that begins with a letter.
#pragma once

enum {
    PORT = 5001,        // TCP
    PACKET_PORT = 5002, // UDP, the guest's and its peer's
    PACKET = 64,        // bytes of a small packet, without headers
    CHUNK = 128 << 10,
};

enum {
    JOB_SEND = 's',           // peer sends until the connection closes
    JOB_RECEIVE = 'r',        // peer reads to the end and answers with the bytes it got (uint64_t)
    JOB_SEND_PACKETS = 'S',   // peer sends packets until the connection closes
    JOB_COUNT_PACKETS = 'R',  // peer counts packets until the guest's sending side closes, and answers with their number
};
