//! Small questions to a service of the lab, to see whether it is ready.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(1);

/// Asks a server on TCP; gives the status and the body.
pub(super) fn ask(server: SocketAddr, method: &str, path: &str) -> io::Result<(u16, String)> {
    let stream = TcpStream::connect_timeout(&server, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    exchange(stream, method, path)
}

/// Asks a server on a socket in the file system; gives the status and the body.
pub(super) fn ask_socket(socket: &Path, method: &str, path: &str) -> io::Result<(u16, String)> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    exchange(stream, method, path)
}

/// One request of HTTP 1.0, whose answer ends with the connection and is never in chunks.
fn exchange(mut stream: impl Read + Write, method: &str, path: &str) -> io::Result<(u16, String)> {
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: lab\r\nContent-Length: 0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((status.unwrap_or_default(), body.to_owned()))
}
