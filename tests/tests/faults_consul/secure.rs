//! A Consul that asks who is there: TLS with a private CA and client certificates, ACLs that deny by
//! default. And servers that lie about who they are.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use ovnet_tests::{
    cluster::{Cluster, Ping, Steps, Stream, until},
    consul::{acl, find_consul, request_as},
};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, IsCa, KeyPair, date_time_ymd,
};
use serde_json::{Value, json};
use xtask::lab::Running;

/// Where the secure Consul is asked by TLS, and without, on docker01 itself, by the test.
const SECURE: &str = "https://192.168.1.11:8511";
const PLAIN: &str = "127.0.0.1:8510";
/// Where a server lies.
const LIAR: &str = "https://192.168.1.11:8512";
/// The name in the good certificate, as `consul tls cert create` makes it.
const NAME: &str = "server.dc1.consul";
/// May do everything.
const MASTER: &str = "11111111-2222-3333-4444-555555555555";
/// As it is shipped, for docker01.
const POLICY: &str = include_str!("../../../ovnet-agent/package/consul-policy.hcl");

#[test]
fn agents_of_a_consul_with_tls_and_acls_on_forward_whatever_becomes_of_their_tokens() {
    let Some(cluster) = Cluster::up("secure", |options| {
        (options.hosts, options.agents) = (2, false);
    }) else {
        return;
    };
    let steps = Steps::default();
    let folder = tempfile::tempdir().unwrap();
    let certificates = Certificates::make(folder.path());
    let _consul = certificates.consul(&cluster);
    until("the secure Consul to lead", || {
        let (status, _) = ask(&cluster, "PUT", "kv/ready", Value::Null);
        (status == 200).then_some(())
    });

    steps.begin("servers that lie, and clients that show no certificate");
    let (ours, none) = (certificates.client(&cluster, true), certificates.client(&cluster, false));
    let named = format!("CONSUL_TLS_SERVER_NAME={NAME}");
    for (liar, variables, told) in [
        ("of another CA", [ours.clone(), vec![named.clone()]].concat(), "not signed by the CA"),
        ("of another name", ours.clone(), "its certificate is for another name"),
        ("expired", [ours.clone(), vec![named.clone()]].concat(), "its certificate has expired"),
    ] {
        let _liar = certificates.liar(&cluster, liar);
        let said = checked(&cluster, &variables, LIAR);
        println!("         {liar}: {said}");
        assert!(said.contains(told) && said.contains(LIAR), "{liar}: {said}");
    }
    let said = checked(&cluster, &[none, vec![named.clone()]].concat(), SECURE);
    println!("         no certificate of ours: {said}");
    assert!(said.contains(SECURE) && said.contains("CONSUL_CLIENT_CERT"), "{said}");
    let said = checked(&cluster, &ours, SECURE);
    assert!(said.contains("CONSUL_TLS_SERVER_NAME"), "{said}");

    steps.begin("agents with the policy of README and a token each");
    let nodes = cluster.lab.nodes();
    let mut tokens: Vec<String> = Vec::new();
    for node in &nodes {
        let policy = POLICY.replace("docker01", node);
        let (status, _) =
            ask(&cluster, "PUT", "acl/policy", json!({ "Name": node, "Rules": policy }));
        assert_eq!(status, 200);
        tokens.push(token(&cluster, node));
        write_token(&cluster, node, &tokens[tokens.len() - 1]);
    }
    let variables = [ours, vec![named]].concat();
    let agents: Vec<Running> = nodes.iter().map(|node| agent(&cluster, node, &variables)).collect();
    for node in &nodes {
        until(&format!("the agent of {node} to answer"), || {
            cluster.lab.exec(node, &["ovnet", "status"]).ok()
        });
        cluster.wait_connected(node);
    }
    cluster.sh("docker02", "ovnet network create ov_net1");
    cluster.sandbox("docker01", "t1", "--network ov_net1");
    let t2 = cluster.sandbox("docker02", "t2", "--network ov_net1");
    cluster.wait_ping("docker01/t1", t2);
    let ping = Ping::start(&cluster.lab, "docker01/t1", t2);
    let stream = Stream::start(&cluster.lab, "docker01/t1", "docker02/t2", t2);
    let before = cluster.footprint("docker01");

    steps.begin("a token is deleted: told in one line, and nothing else happens");
    let (_, listed) = ask(&cluster, "GET", "acl/tokens", Value::Null);
    let of_1 = listed.as_array().unwrap().iter().find(|it| {
        it["Policies"].as_array().is_some_and(|all| all.iter().any(|it| it["Name"] == "docker01"))
    });
    let accessor = of_1.unwrap()["AccessorID"].as_str().unwrap().to_owned();
    assert_eq!(ask(&cluster, "DELETE", &format!("acl/token/{accessor}"), Value::Null).0, 200);
    let refused = until("docker01 to be refused", || {
        let status = cluster.status("docker01");
        let mut told = status["errors"].as_array()?.iter().filter_map(Value::as_str);
        told.find(|it| it.contains("does not know the token of /run/token")).map(str::to_owned)
    });
    println!("         {refused}");
    let said = cluster.refused("docker01", &["ovnet", "network", "create", "ov_net2"]);
    assert!(said.contains("does not know the token of /run/token"), "{said}");
    ping.goes_on(500);
    stream.goes_on();
    assert_eq!(cluster.footprint("docker01"), before);

    steps.begin("a new token in the same file");
    tokens.push(token(&cluster, "docker01"));
    write_token(&cluster, "docker01", &tokens[2]);
    cluster.wait_connected("docker01");
    cluster.sh("docker01", "ovnet network create ov_net2");
    let t3 = cluster.sandbox("docker01", "t3", "--network ov_net1");
    cluster.wait_ping("docker02/t2", t3);

    steps.begin("no token is where anybody could read it");
    for node in &nodes {
        let log = fs::read_to_string(cluster.lab.folder().join(log_of(node))).unwrap();
        let arguments = cluster.run(node, &["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]);
        assert!(arguments.contains("--consul-token-file"), "{arguments}");
        let status = cluster.status(node).to_string();
        for token in &tokens {
            for text in [&log, &arguments, &status] {
                assert!(!text.contains(token.as_str()), "a token is shown: {text}");
            }
        }
    }

    steps.begin("the end");
    ping.must_have_lost_none("of the whole time");
    stream.must_be_whole();
    drop(agents);
}

/// Certificates, in files.
struct Certificates {
    folder: PathBuf,
}

impl Certificates {
    fn make(folder: &Path) -> Self {
        let write = |name: &str, text: String| fs::write(folder.join(name), text).unwrap();
        let (ca, ca_key) = authority("ours");
        let (other, other_key) = authority("another");
        write("ca.pem", ca.pem());
        for (name, names, issuer, expired) in [
            ("server", vec![NAME], (&ca, &ca_key), false),
            ("client", vec!["client.dc1.consul"], (&ca, &ca_key), false),
            ("of another CA", vec![NAME], (&other, &other_key), false),
            ("of another name", vec!["elsewhere.example.org"], (&ca, &ca_key), false),
            ("expired", vec![NAME], (&ca, &ca_key), true),
        ] {
            let names: Vec<String> = names.into_iter().map(str::to_owned).collect();
            let mut parameters = CertificateParams::new(names).unwrap();
            parameters.distinguished_name.push(DnType::CommonName, name);
            if expired {
                parameters.not_before = date_time_ymd(2020, 1, 1);
                parameters.not_after = date_time_ymd(2021, 1, 1);
            }
            let key = KeyPair::generate().unwrap();
            let certificate = parameters.signed_by(&key, issuer.0, issuer.1).unwrap();
            write(&format!("{name}.pem"), certificate.pem());
            write(&format!("{name}.key"), key.serialize_pem());
        }
        Self { folder: folder.to_owned() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// The variables of an agent that trusts our CA and, if it `shows` one, has a certificate.
    fn client(&self, cluster: &Cluster, shows: bool) -> Vec<String> {
        // The hosts of a lab see the machine's files.
        cluster.run("docker01", &["test", "-r", &self.path("ca.pem")]);
        let mut variables = vec![format!("CONSUL_CACERT={}", self.path("ca.pem"))];
        if shows {
            variables.push(format!("CONSUL_CLIENT_CERT={}", self.path("client.pem")));
            variables.push(format!("CONSUL_CLIENT_KEY={}", self.path("client.key")));
        }
        variables
    }

    /// A Consul on docker01 that wants a certificate of everybody and denies by default.
    fn consul(&self, cluster: &Cluster) -> Running {
        let consul = find_consul().unwrap().display().to_string();
        let files = format!(
            "ca_file = \"{}\" cert_file = \"{}\" key_file = \"{}\"",
            self.path("ca.pem"),
            self.path("server.pem"),
            self.path("server.key")
        );
        // What the test itself asks comes by the plain port, which is on loopback.
        let listens = "addresses { http = \"127.0.0.1\" https = \"0.0.0.0\" } \
                       ports { http = 8510 https = 8511 server = 8513 serf_lan = 8514 \
                               serf_wan = -1 dns = -1 grpc = -1 }";
        let mut argv = vec![consul.as_str(), "agent", "-dev", "-bind", "192.168.1.11"];
        argv.extend(["-node", "secure", "-log-level", "warn"]);
        let acl = acl(MASTER);
        let more = "verify_incoming_https = true disable_update_check = true";
        for part in [files.as_str(), listens, acl.as_str(), more] {
            argv.extend(["-hcl", part]);
        }
        cluster.lab.spawn("docker01", &argv, Some("secure.log")).unwrap()
    }

    /// A server on docker01 that shows this certificate.
    fn liar(&self, cluster: &Cluster, name: &str) -> Running {
        let (certificate, key) =
            (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")));
        let argv = [
            "openssl",
            "s_server",
            "-accept",
            "8512",
            "-cert",
            &certificate,
            "-key",
            &key,
            "-quiet",
        ];
        let running = cluster.lab.spawn("docker01", &argv, None).unwrap();
        cluster.lab.wait_for_port("docker01", 8512).unwrap();
        running
    }
}

fn authority(name: &str) -> (Certificate, KeyPair) {
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().unwrap();
    (parameters.self_signed(&key).unwrap(), key)
}

/// What `ovnet-agent check` says of this Consul; it must be one line.
fn checked(cluster: &Cluster, variables: &[String], consul: &str) -> String {
    let mut argv = vec!["env"];
    argv.extend(variables.iter().map(String::as_str));
    argv.extend(["ovnet-agent", "check", "--consul", consul, "--advertise", "ens33"]);
    let output = cluster.lab.output("docker01", &argv, Duration::from_secs(30)).unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<&str> = printed.lines().filter(|line| line.contains(consul)).collect();
    assert_eq!(lines.len(), 1, "{printed}");
    lines[0].to_owned()
}

fn agent(cluster: &Cluster, node: &str, variables: &[String]) -> Running {
    let mut argv = vec!["env"];
    argv.extend(variables.iter().map(String::as_str));
    argv.extend(["ovnet-agent", "--consul", SECURE, "--advertise", "ens33", "--node", node]);
    argv.extend(["--consul-token-file", "/run/token"]);
    cluster.lab.spawn(node, &argv, Some(&log_of(node))).unwrap()
}

fn log_of(node: &str) -> String {
    format!("{node}-secure.log")
}

fn write_token(cluster: &Cluster, node: &str, token: &str) {
    let root = cluster.lab.host(node).unwrap().root();
    fs::write(root.join("run/token.new"), format!("{token}\n")).unwrap();
    fs::rename(root.join("run/token.new"), root.join("run/token")).unwrap();
}

/// A new token with the policy of this host.
fn token(cluster: &Cluster, node: &str) -> String {
    let (status, made) =
        ask(cluster, "PUT", "acl/token", json!({ "Policies": [{ "Name": node }] }));
    assert_eq!(status, 200, "{made}");
    made["SecretID"].as_str().unwrap().to_owned()
}

fn ask(cluster: &Cluster, method: &'static str, path: &str, body: Value) -> (u16, Value) {
    let at: SocketAddr = PLAIN.parse().unwrap();
    let (path, body) = (format!("/v1/{path}"), body.to_string());
    let answer = cluster
        .lab
        .inside("docker01", move || request_as(Some(MASTER), at, method, &path, body.as_bytes()));
    let Ok((status, answer)) = answer else { return (0, Value::Null) };
    (status, serde_json::from_slice(&answer).unwrap_or(Value::Null))
}
