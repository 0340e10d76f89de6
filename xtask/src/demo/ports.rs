//! A published port in the demo: a web server in a sandbox, asked from everywhere.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::session::{SEEN, Session};
use crate::lab::{CLIENT, Lab, Running, table, wait_until};
use crate::tools;

/// The host and the sandbox that serves, and its published port.
const HOST: &str = "docker01";
const NAME: &str = "web1";
const PORT: u16 = 90;
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(3);

/// Publishes a port of a sandbox and asks it in each way there is.
pub(super) fn show(lab: &Lab, session: &Session<'_>) -> Result<()> {
    println!("\nA published port:\n");
    let publish = format!("{PORT}:80");
    session.run(HOST, NAME, &["--network", "ov_net1", "-p", &publish])?;
    let address = lab.address(HOST)?;
    let _server = serve(lab)?;
    let server = SocketAddrV4::new(address, PORT);
    let what = || format!("{NAME} to answer at {server}");
    wait_until(SEEN, what, || Ok(ask(lab, CLIENT, server).ok()))?;
    if tools::find("curl").is_some() {
        session.types(CLIENT, &format!("curl -sS -m 3 {server}"))?;
    }

    println!("\nThe same page from everywhere; it tells whom the server saw:\n");
    let local = SocketAddrV4::new(Ipv4Addr::LOCALHOST, PORT);
    let itself = format!("{HOST}/{NAME}");
    let ways = [
        ("a client outside", CLIENT, server),
        ("another host", "docker02", server),
        ("a sandbox on another host", "docker02/t2", server),
        ("a sandbox on the same host", "docker01/t1", server),
        ("the sandbox itself", &itself, server),
        ("the host, by its address", HOST, server),
        ("the host, by localhost", HOST, local),
    ];
    let mut rows = Vec::new();
    for (who, place, server) in ways {
        let said = ask(lab, place, server).with_context(|| format!("{who} ({place})"))?;
        rows.push(vec![who.to_owned(), place.to_owned(), server.to_string(), said]);
    }
    print!("{}", table(&rows));
    Ok(())
}

/// Starts the server inside the sandbox.
fn serve(lab: &Lab) -> Result<Running> {
    let program = std::env::current_exe().context("find this program")?;
    let program = program.to_str().context("this program's path is not UTF-8")?;
    let place = format!("{HOST}/{NAME}");
    let running = lab.spawn(&place, &[program, "load", "web-server", "80"], None)?;
    lab.wait_for_port(&place, 80)?;
    Ok(running)
}

/// Gives the page as a place of the lab gets it.
fn ask(lab: &Lab, place: &str, server: SocketAddrV4) -> Result<String> {
    let said = lab.inside(place, move || {
        let mut stream = TcpStream::connect_timeout(&server.into(), ANSWER)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.write_all(format!("GET / HTTP/1.0\r\nHost: {server}\r\n\r\n").as_bytes())?;
        let mut said = String::new();
        stream.read_to_string(&mut said)?;
        Ok(said)
    });
    let said = said.with_context(|| format!("ask {server}"))?;
    let page = said.split_once("\r\n\r\n").map(|(_, page)| page.trim().to_owned());
    page.with_context(|| format!("{server} answers {said:?}"))
}
