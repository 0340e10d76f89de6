//! What is typed, right and wrong.

use proptest::prelude::*;

use super::*;

/// The requests of these `-p`, as they are printed.
fn read(specs: &[&str]) -> Result<Vec<String>, String> {
    let specs: Vec<_> = specs.iter().map(ToString::to_string).collect();
    Ok(requests(&specs, false, &[])?.iter().map(ToString::to_string).collect())
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(ToString::to_string).collect()
}

#[test]
fn every_form_of_docker_is_read() {
    for (spec, expected) in [
        ("80", vec!["80/tcp"]),
        ("80/UDP", vec!["80/udp"]),
        ("90:80", vec!["90:80/tcp"]),
        ("0.0.0.0:90:80", vec!["90:80/tcp"]),
        (":90:80", vec!["90:80/tcp"]),
        ("::80", vec!["80/tcp"]),
        ("192.168.1.12:90:80/udp", vec!["192.168.1.12:90:80/udp"]),
        ("192.168.1.12::80", vec!["192.168.1.12::80/tcp"]),
        ("8000-8002:9000-9002", vec!["8000:9000/tcp", "8001:9001/tcp", "8002:9002/tcp"]),
        ("8000-8001/udp", vec!["8000/udp", "8001/udp"]),
        ("127.0.0.1::53-54/udp", vec!["127.0.0.1::53/udp", "127.0.0.1::54/udp"]),
        ("90-95:80", vec!["90-95:80/tcp"]),
        ("90-90:80-80", vec!["90:80/tcp"]),
        ("65535:65535", vec!["65535:65535/tcp"]),
    ] {
        assert_eq!(read(&[spec]).unwrap(), expected, "{spec}");
    }
}

#[test]
fn wrong_input_is_told_in_one_line() {
    for (spec, line) in [
        ("0:80", "host port 0 is not possible: leave it out for a free one"),
        ("90:0", "container port 0 is not possible: 1 is the lowest"),
        ("0", "container port 0 is not possible: 1 is the lowest"),
        ("90:http", "container port \"http\" is not a number"),
        ("-90:80", "a host port is missing"),
        ("+90:80", "host port \"+90\" is not a number"),
        ("90:65536", "container port 65536 is too large: 65535 is the largest"),
        ("99999999999:80", "host port 99999999999 is too large: 65535 is the largest"),
        ("80/icmp", "unknown protocol \"icmp\": tcp and udp can be published"),
        ("80/sctp", "sctp is not supported: tcp and udp can be published"),
        ("80/", "there is no protocol after the slash: /tcp or /udp"),
        ("95-90:80", "the range 95-90 is reversed: the lower port comes first"),
        ("90-92:80-83", "3 host ports cannot lead to 4 container ports: give ranges of one length"),
        ("90:80-83", "1 host ports cannot lead to 4 container ports: give ranges of one length"),
        ("[::1]:90:80", "IPv6 host addresses are not supported: give an IPv4 address"),
        ("[fd00::1]::80", "IPv6 host addresses are not supported: give an IPv4 address"),
        ("fd00::1:90:80", "IPv6 host addresses are not supported: give an IPv4 address"),
        (
            "1:2:3:4",
            "there are too many colons: ADDRESS:HOST_PORT:CONTAINER_PORT is the longest form",
        ),
        ("host:90:80", "\"host\" is not an IPv4 address"),
        ("192.168.1.256:90:80", "\"192.168.1.256\" is not an IPv4 address"),
        ("", "a container port is missing"),
        ("90:", "a container port is missing"),
        (
            ":80",
            "there is no host port before the colon: give one, or leave out the colon for a free \
             one",
        ),
        ("192.168.1.12:90:", "a container port is missing"),
        ("80-", "a container port is missing"),
        ("80-81-82", "container port \"81-82\" is not a number"),
        ("90 :80", "host port \"90 \" is not a number"),
    ] {
        assert_eq!(read(&[spec]), Err(format!("published port {spec:?}: {line}")));
    }
}

#[test]
fn a_host_port_is_asked_for_once() {
    for [a, b] in [
        ["90:80", "90:81"],
        ["192.168.1.12:90:80", "90:81"],
        ["90:80", "192.168.1.12:90:80"],
        ["88-92:88-92", "90:80"],
    ] {
        let line = format!(
            "host port 90/tcp is asked for twice, by {a:?} and {b:?}: choose another for one of \
             them"
        );
        assert_eq!(read(&[a, b]), Err(line));
    }
    for apart in [
        ["90:80", "90:80/udp"],
        ["192.168.1.12:90:80", "192.168.1.11:90:80"],
        ["90-95:80", "90-95:81"],
        ["90:80", "90-95:81"],
        ["80", "80"],
    ] {
        assert_eq!(read(&apart).unwrap().len(), 2, "{apart:?}");
    }
}

#[test]
fn exposed_ports_are_published_only_when_all_are() {
    let expose = strings(&["80/tcp", "53/udp", "8000-8001/udp", "80"]);
    let publish = strings(&["90:53/udp"]);
    let shown = |all| -> Vec<String> {
        requests(&publish, all, &expose).unwrap().iter().map(ToString::to_string).collect()
    };
    assert_eq!(shown(false), ["90:53/udp"]);
    assert_eq!(shown(true), ["90:53/udp", "80/tcp", "8000/udp", "8001/udp"]);
    for (spec, line) in [
        ("0/tcp", "container port 0 is not possible: 1 is the lowest"),
        ("80/sctp", "sctp is not supported: tcp and udp can be published"),
        ("", "a container port is missing"),
        ("81-80", "the range 81-80 is reversed: the lower port comes first"),
        (
            "90:80",
            "a port of the container alone is exposed, as 80/tcp: publish it with -p to give it a \
             host port",
        ),
    ] {
        let refused = requests(&[], false, &strings(&[spec])).unwrap_err();
        assert_eq!(refused, format!("exposed port {spec:?}: {line}"));
    }
}

#[test]
fn an_endpoint_has_so_many_ports() {
    assert_eq!(read(&["1001-2024"]).unwrap().len(), MAX_PORTS);
    assert_eq!(
        read(&["1001-2024", "80"]).unwrap_err(),
        "1025 ports are to be published: an endpoint has at most 1024"
    );
}

#[test]
fn a_private_port_is_tcp_where_nothing_is_said() {
    assert_eq!("80".parse::<PrivatePort>().unwrap().to_string(), "80/tcp");
    assert_eq!("53/udp".parse::<PrivatePort>().unwrap().to_string(), "53/udp");
    for wrong in ["", "0", "80-81", "a", "80/x", "90:80"] {
        wrong.parse::<PrivatePort>().unwrap_err();
    }
}

#[test]
fn chosen_ports_are_those_nobody_named() {
    let asked = requests(&strings(&["90:80", "81", "100-101:82", "80"]), false, &[]).unwrap();
    let port = |host_port, container_port| PublishedPort {
        protocol: Protocol::Tcp,
        host_address: Ipv4Addr::UNSPECIFIED,
        host_port,
        container_port,
    };
    let ports = [port(90, 80), port(32768, 81), port(100, 82), port(32769, 80)];
    let shown: Vec<_> = chosen(&asked, &ports).map(|it| it.host_port).collect();
    assert_eq!(shown, [32768, 100, 32769]);
}

proptest! {
    #[test]
    fn what_is_printed_is_read_as_the_same(
        udp: bool,
        address in proptest::option::of(1..=u32::MAX),
        host in proptest::option::of((1..=u16::MAX, 1..=u16::MAX)),
        container_port in 1..=u16::MAX,
    ) {
        let request = PortRequest {
            protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
            host_address: address.map(Ipv4Addr::from),
            host_ports: host.map(|(a, b)| a.min(b)..=a.max(b)),
            container_port,
        };
        prop_assert_eq!(requests(&[request.to_string()], false, &[]), Ok(vec![request]));
    }

    #[test]
    fn nothing_typed_makes_it_panic_or_break_the_line(spec in "\\PC{0,12}|[0-9:./-]{0,20}") {
        let given = [spec];
        if let Err(line) = requests(&given, true, &given) {
            prop_assert_eq!(line.lines().count(), 1);
        }
    }
}
