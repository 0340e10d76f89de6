//! Real sockets: on 127.0.0.1 with ports the kernel chooses, or in a namespace of their own.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sched::{CloneFlags, unshare},
};

use super::*;
use crate::{
    publish::spec,
    service::{Kind, kind_of, one_line},
};

const HERE: [Ipv4Addr; 1] = [Ipv4Addr::new(192, 168, 1, 11)];

fn owner(name: &str) -> Owner {
    Owner { id: format!("id of {name}"), name: name.into() }
}

fn requests(specs: &[&str]) -> Vec<PortRequest> {
    let specs: Vec<_> = specs.iter().map(ToString::to_string).collect();
    spec::requests(&specs, false, &[]).unwrap()
}

fn reserve(it: &Reservations, name: &str, specs: &[&str]) -> Result<Vec<u16>> {
    let ports = it.reserve(&owner(name), &requests(specs), &HERE)?;
    Ok(ports.iter().map(|it| it.host_port).collect())
}

fn refused(it: &Reservations, name: &str, specs: &[&str]) -> String {
    let before = it.count();
    let error = reserve(it, name, specs).unwrap_err();
    assert!(kind_of(&error).is_some(), "{error:#}");
    assert_eq!(it.count(), before);
    one_line(&error)
}

/// This program, as it is named where it has a port.
fn this_program() -> String {
    let process = procfs::process::Process::myself().unwrap();
    format!("{} (pid {})", process.stat().unwrap().comm, process.pid)
}

/// Runs a test in a network namespace of its own, on a thread that ends with it.
fn in_a_namespace(name: &str, test: impl FnOnce() + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        test();
        nix::Result::Ok(())
    };
    match std::thread::spawn(run).join() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            assert!(std::env::var_os("OVNET_REQUIRE_ALL").is_none(), "{name}: {error}");
            println!("SKIP {name}: a network namespace cannot be made: {error}");
        }
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

#[test]
fn a_free_port_is_reserved_until_it_is_released() {
    let it = Reservations::default();
    for (specs, protocol) in [(["127.0.0.1::80"], "tcp"), (["127.0.0.1::80/udp"], "udp")] {
        let port = reserve(&it, "t1", &specs).unwrap()[0];
        assert_ne!(port, 0);
        assert_eq!(
            refused(&it, "t2", &[&format!("127.0.0.1:{port}:80/{protocol}")]),
            format!(
                "port {port}/{protocol} of 127.0.0.1 is in use by endpoint t1: choose another, or \
                 detach it"
            )
        );
    }
    it.release(&owner("t2").id);
    assert_eq!(it.count(), 2);
    it.release(&owner("t1").id);
    assert_eq!(it.count(), 0);
}

#[test]
fn a_port_of_a_program_is_a_conflict_that_names_it() {
    let it = Reservations::default();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for (port, protocol) in [
        (listener.local_addr().unwrap().port(), "tcp"),
        (socket.local_addr().unwrap().port(), "udp"),
    ] {
        for (address, prefix) in [("0.0.0.0", ""), ("127.0.0.1", "127.0.0.1:")] {
            assert_eq!(
                refused(&it, "t1", &[&format!("{prefix}{port}:80/{protocol}")]),
                format!(
                    "port {port}/{protocol} of {address} is in use by {}: choose another, or stop \
                     it",
                    this_program()
                )
            );
        }
    }
}

#[test]
fn a_listener_on_every_address_of_either_family_is_a_conflict() {
    in_a_namespace("a_listener_on_every_address_of_either_family_is_a_conflict", || {
        let it = Reservations::default();
        for every in ["0.0.0.0:90", "[::]:90"] {
            let every: SocketAddr = every.parse().unwrap();
            let _taken = (TcpListener::bind(every).unwrap(), UdpSocket::bind(every).unwrap());
            for spec in ["90:80", "192.168.1.11:90:80", "90:80/udp", "192.168.1.11:90:80/udp"] {
                let line = refused(&it, "t1", &[spec]);
                assert!(line.contains(&format!("in use by {}", this_program())), "{line}");
            }
        }
        // And the other way round: nobody gets in beside a reservation.
        reserve(&it, "t1", &["90:80", "90:80/udp"]).unwrap();
        for every in ["0.0.0.0:90", "[::]:90"] {
            assert_eq!(TcpListener::bind(every).unwrap_err().kind(), ErrorKind::AddrInUse);
            assert_eq!(UdpSocket::bind(every).unwrap_err().kind(), ErrorKind::AddrInUse);
        }
    });
}

#[test]
fn a_range_gives_its_first_free_port_after_those_without_a_choice() {
    in_a_namespace("a_range_gives_its_first_free_port_after_those_without_a_choice", || {
        let it = Reservations::default();
        let _taken = TcpListener::bind("0.0.0.0:90").unwrap();
        assert_eq!(reserve(&it, "t1", &["90-93:80", "91:81", "90:82/udp"]).unwrap(), [92, 91, 90]);
        assert_eq!(reserve(&it, "t2", &["90-93:80"]).unwrap(), [93]);
        assert_eq!(
            refused(&it, "t3", &["89:80", "90-93:81"]),
            "ports 90-93/tcp of 0.0.0.0 are all in use: choose others"
        );
        // What was reserved before the conflict is free again.
        drop(TcpListener::bind("0.0.0.0:89").unwrap());
    });
}

#[test]
fn addresses_share_a_port_and_only_those_of_the_host_have_one() {
    in_a_namespace("addresses_share_a_port_and_only_those_of_the_host_have_one", || {
        let it = Reservations::default();
        let both = ["192.168.1.11:90:80", "127.0.0.1:90:80", "127.1.2.3:90:81"];
        assert_eq!(reserve(&it, "t1", &both).unwrap(), [90; 3]);
        assert_eq!(
            refused(&it, "t2", &["90:80"]),
            "port 90/tcp of 0.0.0.0 is in use by endpoint t1: choose another, or detach it"
        );
        let error = reserve(&it, "t2", &["192.168.1.12:91:80"]).unwrap_err();
        assert_eq!(kind_of(&error), Some(Kind::Invalid));
        assert_eq!(
            one_line(&error),
            "192.168.1.12 is not an address of this host, which has 192.168.1.11: publish on one \
             of them, or on all by naming none"
        );
    });
}

#[test]
fn what_was_published_is_held_again_and_what_was_taken_is_told() {
    in_a_namespace("what_was_published_is_held_again_and_what_was_taken_is_told", || {
        let it = Reservations::default();
        let ports = it.reserve(&owner("t1"), &requests(&["90:80", "91:80/udp"]), &HERE).unwrap();
        let endpoint = LocalEndpoint {
            record: crate::consul::schema::EndpointRecord {
                id: owner("t1").id,
                names: vec!["t1".into()],
                ..crate::service::fake::record()
            },
            ports,
            ..crate::service::fake::local_endpoint()
        };
        assert!(it.hold(&endpoint).is_empty());
        drop(it);

        let it = Reservations::default();
        let taken = UdpSocket::bind("0.0.0.0:91").unwrap();
        let line = format!(
            "port 91/udp of 0.0.0.0 is published by endpoint t1 and in use by {}, too: stop one \
             of them",
            this_program()
        );
        assert_eq!(it.hold(&endpoint), [line.as_str()]);
        assert_eq!(it.hold(&endpoint), [line]);
        assert_eq!(it.count(), 1);
        drop(taken);
        assert!(it.hold(&endpoint).is_empty());
        assert_eq!(it.count(), 2);

        let docker = crate::state::DockerEndpoint { network: "n".into(), container: None };
        let of_docker = LocalEndpoint { docker: Some(docker), ..endpoint };
        assert!(Reservations::default().hold(&of_docker).is_empty());
    });
}

#[test]
fn nobody_is_accepted_and_nothing_received() {
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
    let (listener, port) = socket::bind(Protocol::Tcp, address).unwrap();
    let there = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    // A listener without the filter answers within microseconds.
    let error = TcpStream::connect_timeout(&there, Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    let listed = procfs::net::tcp().unwrap();
    assert!(
        listed
            .iter()
            .any(|it| it.local_address == there && it.state == procfs::net::TcpState::Listen)
    );

    let (receiver, port) = socket::bind(Protocol::Udp, address).unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.send_to(b"a", (Ipv4Addr::LOCALHOST, port)).unwrap();
    let received = UdpSocket::from(receiver.try_clone().unwrap()).recv(&mut [0]);
    assert_eq!(received.unwrap_err().kind(), ErrorKind::WouldBlock);

    for socket in [listener, receiver] {
        assert!(socket.as_raw_fd() > 2);
        let flags = FdFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
    }
}

#[test]
fn an_owner_is_known_by_its_name_or_the_start_of_its_id() {
    let id = "0123456789abcdef";
    assert_eq!(Owner::new(id, &["t1".into(), "web".into()]).name, "t1");
    assert_eq!(Owner::new(id, &[]).name, "0123456789ab");
}
