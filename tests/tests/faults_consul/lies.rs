//! Records that lie, written by hand while traffic flows.

use ovnet_tests::cluster::{Cluster, Steps, text, until};
use serde_json::{Value, json};

use crate::Busy;

#[test]
fn records_that_lie_take_nothing_from_the_honest_and_are_told_of() {
    let Some(cluster) = Cluster::up("lies", |options| {
        // A host that was announced by hand is forgotten so long after its record.
        options.agent_args =
            ["--repair-interval", "2", "--host-grace", "4"].map(str::to_owned).to_vec();
    }) else {
        return;
    };
    let steps = Steps::default();
    let busy = Busy::start(cluster);
    let cluster = &busy.cluster;
    let inspected = cluster.json("docker01", "network inspect ov_net1")[0].clone();
    let id = text(&inspected, "id").unwrap().to_owned();
    let (vni, subnet) = (inspected["vni"].clone(), text(&inspected, "subnet").unwrap().to_owned());
    let of_2 = endpoint_of(cluster, "docker02");
    let address = text(&of_2, "address").unwrap().to_owned();
    let key = format!("endpoints/{id}/{address}");
    let record: Value = serde_json::from_str(&cluster.record(&key).unwrap()).unwrap();
    let with = |changes: &[(&str, Value)]| {
        let mut lie = record.clone();
        for (field, value) in changes {
            lie[*field] = value.clone();
        }
        lie.to_string()
    };

    steps.begin("an endpoint's record is written over: host, MAC, state, all of it");
    for lie in [
        with(&[("host", json!("docker03"))]),
        with(&[("host", json!("docker03")), ("id", json!("another"))]),
        with(&[("mac", json!("02:42:66:66:66:66"))]),
        with(&[("state", json!("reserved"))]),
        with(&[("address", json!("10.0.0.200"))]),
        "{".to_owned(),
    ] {
        cluster.put_record(&key, &lie);
        busy.goes_on();
        let readable = lie.contains(&format!("\"address\":\"{address}\""));
        if readable {
            until(&format!("docker02 to put its record back over {lie}"), || {
                (cluster.record(&key) == busy.records.get(&key).cloned()).then_some(())
            });
        } else {
            // It may be of a newer version, which is nobody's to write over.
            until("it to be counted", || {
                (cluster.status("docker01")["unreadable_records"] == 1).then_some(())
            });
            cluster.put_record(&key, &busy.records[&key]);
        }
        until("all records to be as they were", || {
            (cluster.records() == busy.records).then_some(())
        });
    }
    let said = cluster.lab.agent_output("docker01");
    assert!(said.contains("it was overwritten, and what it said before stands"), "{said}");

    steps.begin("a network's record is written over");
    let network: Value = serde_json::from_str(&busy.records["networks/ov_net1"]).unwrap();
    let mut lie = network.clone();
    (lie["vni"], lie["id"]) = (json!(5555), json!("66666666"));
    cluster.put_record("networks/ov_net1", &lie.to_string());
    busy.goes_on();
    until("the network's record to be put back", || {
        (cluster.records() == busy.records).then_some(())
    });

    steps.begin("hosts and endpoints and networks that claim what others have");
    let host = |node: &str, vtep: &str| {
        (format!("hosts/{node}"), json!({ "v": 1, "node": node, "vtep": vtep }).to_string())
    };
    let endpoint = |address: &str, host: &str| {
        let lie = json!({ "v": 1, "id": address, "address": address, "host": host,
                          "mac": record["mac"] });
        (format!("endpoints/{id}/{address}"), lie.to_string())
    };
    let reused = |name: &str, vni: &Value, subnet: &str| {
        let mut lie = network.clone();
        (lie["name"], lie["id"]) = (json!(name), json!(format!("66666666-{name}")));
        (lie["vni"], lie["subnet"]) = (vni.clone(), json!(subnet));
        lie["gateway"] = json!(subnet.replace(".0/24", ".1"));
        (format!("networks/{name}"), lie.to_string())
    };
    let lies = [
        // Before all others by name, and the addresses of docker02 and of whoever reads it.
        host("aaa", "192.168.1.12"),
        host("aab", "192.168.1.11"),
        // Under a key of somebody else.
        ("hosts/aac".to_owned(), host("docker03", "192.168.1.12").1),
        // The gateway's address, one of another subnet, and a double MAC.
        endpoint("10.0.0.1", "docker03"),
        endpoint("10.9.9.9", "docker03"),
        endpoint("10.0.0.66", "docker03"),
        reused("aan", &vni, "10.200.0.0/24"),
        reused("aao", &json!(7777), &subnet),
    ];
    for (key, lie) in &lies {
        cluster.put_record(key, lie);
    }
    let told = |node: &str, line: &str| {
        until(&format!("{node} to tell: {line}"), || {
            let status = cluster.status(node);
            status["errors"].as_array()?.iter().any(|it| it.as_str() == Some(line)).then_some(())
        });
        busy.goes_on_among_others();
        let said = cluster.lab.agent_output(node);
        assert_eq!(said.matches(line).count(), 1, "{node} must say once: {line}\n{said}");
    };
    let ignored = "a record is ignored: ";
    told(
        "docker03",
        &format!(
            "{ignored}hosts docker02 and aaa both claim the VTEP address 192.168.1.12; docker02 \
             keeps it"
        ),
    );
    told("docker02", &format!("{ignored}host aaa claims the VTEP address 192.168.1.12"));
    told("docker01", &format!("{ignored}host aab claims the VTEP address 192.168.1.11"));
    for address in ["10.0.0.1", "10.9.9.9"] {
        let line = format!("host docker03 claims {address}, which no endpoint of network ov_net1");
        told("docker01", &format!("{ignored}{line} can have"));
    }
    told("docker01", &format!("{ignored}networks aan and ov_net1 both say VNI {vni}"));
    told("docker01", &format!("{ignored}networks aao and ov_net1 overlap: {subnet} and {subnet}"));
    assert_eq!(cluster.status("docker01")["unreadable_records"], 1, "hosts/aac");

    steps.begin("nobody gets into a network by another's VNI");
    let refused =
        cluster.refused("docker01", &["ovnet", "attach", "--network", "aan", "--netns", "proof"]);
    println!("         {refused}");
    assert!(refused.contains(&format!("says VNI {vni}, which network {id} has claimed")));

    steps.begin("an agent that starts among the lies still believes who holds a lease");
    cluster.stop_agent("docker01", nix::sys::signal::Signal::SIGKILL);
    cluster.start_agent("docker01");
    until("docker01 to be announced and to have read all", || {
        let errors = cluster.status("docker01")["errors"].to_string();
        (errors.contains("docker02 keeps it") && !errors.contains("not announced")).then_some(())
    });
    busy.goes_on_among_others();

    steps.begin("the lies are deleted");
    for (key, _) in &lies {
        cluster.delete_record(key);
    }
    until("everything to be as it was", || {
        (cluster.records() == busy.records && busy.is_as_it_was()).then_some(())
    });
    for node in cluster.lab.nodes() {
        cluster.wait_connected(&node);
    }
    busy.must_have_lost_none();
}

/// The first endpoint of a host.
fn endpoint_of(cluster: &Cluster, host: &str) -> Value {
    cluster.json(host, "endpoint ls --local")[0].clone()
}
