//! Calls to the plugin's socket that Docker would not make.

use std::{io::Write as _, os::unix::net::UnixStream};

use ovnet_tests::cluster::{Cluster, Steps};
use serde_json::{Value, json};

/// The plugin's socket, in its host.
const SOCKET: &str = "run/docker/plugins/ovnet.sock";
/// Every call of the protocol that has arguments, and an object with one field of a wrong type.
const CALLS: [(&str, &str); 16] = [
    ("IpamDriver.RequestPool", r#"{"Options":7}"#),
    ("IpamDriver.ReleasePool", r#"{"PoolID":[]}"#),
    ("IpamDriver.RequestAddress", r#"{"PoolID":{}}"#),
    ("IpamDriver.ReleaseAddress", r#"{"Address":1}"#),
    ("NetworkDriver.CreateNetwork", r#"{"NetworkID":{},"IPv4Data":"all"}"#),
    ("NetworkDriver.DeleteNetwork", r#"{"NetworkID":3}"#),
    ("NetworkDriver.CreateEndpoint", r#"{"Interface":"eth0"}"#),
    ("NetworkDriver.DeleteEndpoint", r#"{"EndpointID":true}"#),
    ("NetworkDriver.EndpointOperInfo", r#"{"EndpointID":true}"#),
    ("NetworkDriver.Join", r#"{"SandboxKey":["/"]}"#),
    ("NetworkDriver.Leave", "[]"),
    ("NetworkDriver.ProgramExternalConnectivity", "[]"),
    ("NetworkDriver.RevokeExternalConnectivity", "7"),
    ("NetworkDriver.DiscoverNew", "\"x\""),
    ("NetworkDriver.AllocateNetwork", "{}"),
    ("NetworkDriver.FreeNetwork", "{}"),
];
/// Ids that nobody has.
const UNKNOWN: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

#[test]
fn bad_calls_get_an_error_and_harm_nothing() {
    let Some(cluster) = Cluster::with_docker("docker-calls", |options| options.hosts = 2) else {
        return;
    };
    let steps = Steps::default();
    cluster.docker_network("docker02", "ov_net1", "");
    cluster.container("docker01", "t1", "--network ov_net1");
    let t2 = cluster.container("docker02", "t2", "--network ov_net1");
    cluster.wait_ping("docker01/t1", t2);
    let agent = cluster.lab.agent("docker01").unwrap();
    let call = |path: &str, body: &[u8]| {
        cluster.ask_socket("docker01", SOCKET, "POST", &format!("/{path}"), body).unwrap()
    };

    steps.begin("broken JSON, wrong types, a megabyte of garbage");
    let garbage = vec![b'{'; 1 << 20];
    let noise: Vec<u8> =
        (0..1_u32 << 20).map(|it| it.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    for (path, wrong) in CALLS {
        for body in
            [b"{\"NetworkID\":".as_slice(), b"\xff\xfe\x00", wrong.as_bytes(), &garbage, &noise]
        {
            let (status, answer) = call(path, body);
            assert!(status >= 400, "{path} takes it: {status} {answer}");
            one_line_of(&answer);
        }
    }

    steps.begin("empty bodies, and ids nobody has");
    let unknown = json!({
        "NetworkID": UNKNOWN,
        "EndpointID": UNKNOWN,
        "PoolID": UNKNOWN,
        "Address": "10.0.0.9",
        "SandboxKey": "/var/run/docker/netns/0123456789ab",
        "Interface": { "Address": "10.0.0.9/24", "AddressIPv6": "", "MacAddress": "" },
        "Options": null,
    });
    let unknown = serde_json::to_vec(&unknown).unwrap();
    for (path, _) in CALLS {
        let harmless = ["ReleasePool", "ReleaseAddress", "DeleteNetwork", "DeleteEndpoint"];
        for body in [b"".as_slice(), b"{}", &unknown] {
            let (status, answer) = call(path, body);
            if status == 200 {
                let _: Value = serde_json::from_str(&answer).unwrap();
            } else {
                one_line_of(&answer);
            }
            // Docker goes on with what it takes away, whatever we know of it.
            if harmless.iter().any(|it| path.ends_with(it)) && !body.is_empty() {
                assert_eq!(status, 200, "{path}: {answer}");
            }
            if path.ends_with("Join") || path.ends_with("CreateEndpoint") {
                assert!(status >= 400, "{path}: {answer}");
            }
        }
    }

    steps.begin("what is no call at all");
    for (method, path) in
        [("GET", "/Plugin.Activate"), ("PUT", "/"), ("POST", "/Plugin.None"), ("POST", "/../..")]
    {
        let (status, answer) = cluster.ask_socket("docker01", SOCKET, method, path, b"{}").unwrap();
        assert!((400..500).contains(&status), "{method} {path}: {status}");
        one_line_of(&answer);
    }

    steps.begin("clients that hang, at every point of a request");
    let request =
        "POST /NetworkDriver.Join HTTP/1.1\r\nHost: plugin\r\nContent-Length: 9000\r\n\r\n{\"Net";
    let hanging: Vec<UnixStream> = [0, 3, 20, 60, request.len()]
        .iter()
        .cycle()
        .take(100)
        .map(|length| {
            let mut stream = UnixStream::connect(cluster.path("docker01", SOCKET)).unwrap();
            stream.write_all(&request.as_bytes()[..*length]).unwrap();
            stream
        })
        .collect();
    let t3 = cluster.container("docker01", "t3", "--network ov_net1");
    cluster.wait_ping("docker02/t2", t3);
    cluster.remove("docker01", "t3");
    drop(hanging);

    steps.begin("nothing is harmed");
    assert_eq!(cluster.lab.agent("docker01"), Some(agent), "the same agent");
    cluster.wait_ping("docker01/t1", t2);
    let pools = cluster.records().into_keys().filter(|key| key.starts_with("pending/")).count();
    // `{}` asks for a pool as well as anything: of a network that then was not made.
    assert!(pools <= 3, "{pools} subnets claimed");
    let said = cluster.lab.agent_output("docker01");
    assert!(!said.contains("panicked"), "{said}");
}

/// The one line of an error's answer.
fn one_line_of(answer: &str) {
    let read: Value = serde_json::from_str(answer).unwrap_or_default();
    let line = read["Err"].as_str().unwrap_or_else(|| panic!("no Err in {answer:?}"));
    assert!(!line.is_empty() && line.lines().count() == 1, "{line:?}");
    assert!(line.len() < 1000, "{} bytes of error", line.len());
}
