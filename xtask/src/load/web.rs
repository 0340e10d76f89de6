//! A web server whose only page says who asks.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};

/// How long a client may take for its request.
const PATIENCE: Duration = Duration::from_secs(2);

/// Answers until it is killed, one after another.
pub(super) fn serve(address: SocketAddrV4) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
    for stream in listener.incoming() {
        // One that ends early is its client's loss.
        let _ = answer(stream.context("accept a connection")?);
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let page = format!("Hello, {}.\n", stream.peer_addr()?.ip());
    // The request is read to its end: closing before would reset the connection.
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.ends_with(b"\r\n\r\n") && request.len() < 1 << 16 {
        match stream.read(&mut buffer)? {
            0 => break,
            count => request.extend(buffer.iter().take(count)),
        }
    }
    let length = page.len();
    let head =
        format!("HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\r\n");
    Ok(stream.write_all(&[head.as_bytes(), page.as_bytes()].concat())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_says_who_asks() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: docker01\r\n\r\n").unwrap();
        answer(listener.accept().unwrap().0).unwrap();
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        assert!(said.starts_with("HTTP/1.0 200 OK\r\n"), "{said}");
        assert!(said.ends_with("\r\n\r\nHello, 127.0.0.1.\n"), "{said}");
    }
}
