//! TCP and UDP between sandboxes, with sockets of this process: content is compared, not counted.

use std::{
    hash::{DefaultHasher, Hasher as _},
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    thread,
    time::Duration,
};

use nix::libc;
use xtask::lab::Lab;

const LIMIT: Duration = Duration::from_secs(20);

/// A sandbox (or host) and its address.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
}

/// Sends `length` bytes over one TCP connection, 64 KiB a write, and asserts that they arrive as
/// they were.
#[track_caller]
pub(crate) fn tcp(lab: &Lab, from: &str, to: &Place, length: usize) {
    let (listener, address) = listen(lab, to);
    tcp_to(lab, from, listener, address, length);
}

/// As [`tcp`], to an address that somebody translates to the listener's.
#[track_caller]
pub(crate) fn tcp_to(
    lab: &Lab,
    from: &str,
    listener: TcpListener,
    target: SocketAddrV4,
    length: usize,
) {
    let (hash, received) = receive_and_send(lab, from, listener, target, length);
    let (hash_received, length_received) = received;
    assert_eq!(length_received, length, "{from} > {target}: bytes that arrived");
    assert_eq!(hash_received, hash, "{from} > {target}: the content changed on the way");
}

/// Listens on a free port of a place.
pub(crate) fn listen(lab: &Lab, place: &Place) -> (TcpListener, SocketAddrV4) {
    let address = place.address;
    let listener = lab.inside(&place.name, move || Ok(TcpListener::bind((address, 0))?)).unwrap();
    match listener.local_addr() {
        Ok(SocketAddr::V4(own)) => (listener, own),
        other => panic!("no IPv4 listener: {other:?}"),
    }
}

/// Hash of what was sent; hash and length of what arrived.
fn receive_and_send(
    lab: &Lab,
    from: &str,
    listener: TcpListener,
    target: SocketAddrV4,
    length: usize,
) -> (u64, (u64, usize)) {
    // Connected first, so that a connection that does not come about is told as such.
    let mut stream = lab
        .inside(from, move || Ok(TcpStream::connect_timeout(&target.into(), LIMIT)?))
        .unwrap_or_else(|error| panic!("{from} > {target}: {error:#}"));
    let receiver = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let (mut hash, mut total) = (DefaultHasher::new(), 0);
        let mut buffer = vec![0; 1 << 16];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    hash.write(&buffer[..count]);
                    total += count;
                }
                // A machine that was paused for a moment.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    eprintln!("after {total} bytes: {error}");
                    break;
                }
            }
        }
        (hash.finish(), total)
    });
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    let data = noise(length);
    for chunk in data.chunks(1 << 16) {
        if let Err(error) = stream.write_all(chunk) {
            eprintln!("{from} > {target}: {error}");
            break;
        }
    }
    drop(stream);
    let mut hash = DefaultHasher::new();
    hash.write(&data);
    (hash.finish(), receiver.join().unwrap())
}

/// Sends datagrams of these lengths one by one, each answered with its own content.
#[track_caller]
pub(crate) fn udp(lab: &Lab, from: &str, to: &Place, lengths: &[usize]) {
    let (server, client) = udp_pair(lab, from, to);
    let target = server.local_addr().unwrap();
    let mut buffer = vec![0; 1 << 16];
    for &length in lengths {
        let data = noise(length);
        client.send_to(&data, target).unwrap();
        let told = |error| panic!("{from} > {target}: {length} bytes: {error}");
        let (count, sender) = server.recv_from(&mut buffer).unwrap_or_else(told);
        assert!(buffer[..count] == data, "{from} > {target}: {length} bytes are not the same");
        server.send_to(&data, sender).unwrap();
        let (count, _) = client.recv_from(&mut buffer).unwrap_or_else(told);
        assert!(buffer[..count] == data, "{target} > {from}: {length} bytes are not the same");
    }
}

/// Whether one of three datagrams arrives within a moment.
pub(crate) fn reaches(lab: &Lab, from: &str, to: &Place) -> bool {
    let (server, client) = udp_pair(lab, from, to);
    server.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    for _ in 0..3 {
        // Where the neighbour is known to be missing the kernel may refuse to send.
        let _ = client.send_to(b"anybody there?", server.local_addr().unwrap());
    }
    server.recv_from(&mut [0; 64]).is_ok()
}

/// Hands the kernel one buffer that it is to cut into datagrams (`UDP_SEGMENT`); all must arrive,
/// in order. Each is `segment` bytes long.
#[track_caller]
pub(crate) fn udp_segmented(lab: &Lab, from: &str, to: &Place, segment: usize, count: usize) {
    const UDP_SEGMENT: i32 = 103;
    let (server, client) = udp_pair(lab, from, to);
    set(&client, libc::SOL_UDP, UDP_SEGMENT, i32::try_from(segment).unwrap());
    let data = noise(segment * count);
    client.send_to(&data, server.local_addr().unwrap()).unwrap();
    let mut buffer = vec![0; 1 << 16];
    for (number, expected) in data.chunks(segment).enumerate() {
        let (length, _) = server
            .recv_from(&mut buffer)
            .unwrap_or_else(|error| panic!("{from}: segment {number} of {count}: {error}"));
        assert!(buffer[..length] == *expected, "{from}: segment {number} is not the same");
    }
}

/// A socket bound in each of two places.
pub(crate) fn udp_pair(lab: &Lab, from: &str, to: &Place) -> (UdpSocket, UdpSocket) {
    (udp_socket(lab, &to.name, to.address), udp_socket(lab, from, Ipv4Addr::UNSPECIFIED))
}

/// A bound socket whose reads end within seconds.
pub(crate) fn udp_socket(lab: &Lab, place: &str, address: Ipv4Addr) -> UdpSocket {
    let socket = lab.inside(place, move || Ok(UdpSocket::bind((address, 0))?)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    socket
}

/// Sets a socket option that is an integer.
pub(crate) fn set(socket: &impl AsRawFd, level: i32, option: i32, value: i32) {
    let size = libc::socklen_t::try_from(size_of::<i32>()).unwrap();
    // SAFETY: the value is an integer and as long as we say.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), size)
    };
    assert_eq!(result, 0, "set option {option}: {}", std::io::Error::last_os_error());
}

/// Bytes without a pattern (xorshift), the same each time.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_ne_bytes());
    }
    bytes.truncate(length);
    bytes
}
