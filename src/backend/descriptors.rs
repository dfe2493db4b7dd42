//! Descriptors that go from process to process with a message on a unix socket (unix(7), `SCM_RIGHTS`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Most descriptors of a message.
const MOST: usize = 2;

/// Sends bytes, with descriptors; who hung up is an error, never a signal.
///
/// # Errors
/// The host's.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>], flags: SendFlags) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        match sendmsg(&socket, &[IoSlice::new(bytes)], &mut ancillary, flags | SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => return Ok(sent.map(drop)?),
        }
    }
}

/// Receives as many bytes as there is room for, and descriptors. Returns how many bytes, which are none at the end of all.
///
/// # Errors
/// The host's, and when there was no room for all of a message.
pub fn receive(socket: impl AsFd, bytes: &mut [u8], flags: RecvFlags) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(&socket, &mut [IoSliceMut::new(bytes)], &mut ancillary, flags | RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            received => break received?,
        }
    };
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::other("a message that is too long"));
    }
    Ok((received.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    #[test]
    fn what_is_sent_arrives_or_is_refused() {
        let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let (ours, theirs) = pair();
        let (mut reader, mut writer) = io::pipe().unwrap();
        send(&ours, b"two", &[reader.as_fd(), writer.as_fd()], SendFlags::empty()).unwrap();
        let (bytes, fds) = receive(&theirs, &mut [0; 8], RecvFlags::DONTWAIT).unwrap();
        assert_eq!((bytes, fds.len()), (3, 2));
        let mut other: File = fds.into_iter().next_back().unwrap().into();
        other.write_all(b"x").unwrap();
        drop((other, std::mem::replace(&mut writer, io::pipe().unwrap().1)));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x", "it is the same pipe");

        let many = [reader.as_fd(); 9];
        assert_eq!(send(&ours, b"x", &many, SendFlags::empty()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        send(&ours, b"too long", &[], SendFlags::empty()).unwrap();
        assert!(receive(&theirs, &mut [0; 3], RecvFlags::DONTWAIT).is_err());
        let empty = receive(&theirs, &mut [0; 3], RecvFlags::DONTWAIT).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        drop(ours);
        assert_eq!(receive(&theirs, &mut [0; 3], RecvFlags::empty()).unwrap().0, 0);
        assert!(send(&theirs, b"x", &[], SendFlags::empty()).is_err());
    }
}
