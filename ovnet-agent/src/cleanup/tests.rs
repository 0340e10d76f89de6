//! A host's leftovers in a temporary folder, cleaned up.

use std::{collections::BTreeSet, sync::Mutex};

use anyhow::anyhow;
use tempfile::TempDir;

use super::*;
use crate::{
    api::socket::Socket,
    service::fake::{self, attach},
};

struct FakeLinks {
    names: Mutex<BTreeSet<String>>,
    stuck: &'static str,
}

impl Links for FakeLinks {
    async fn names(&self) -> Result<Vec<String>> {
        Ok(self.names.lock().unwrap().iter().cloned().collect())
    }

    async fn delete(&self, name: &str) -> Result<()> {
        if name == self.stuck {
            return Err(anyhow!("delete link {name}: it is stuck"));
        }
        self.names.lock().unwrap().remove(name);
        Ok(())
    }

    async fn unhook(&self) -> Result<Vec<String>> {
        Ok(vec![])
    }

    async fn unfilter(&self) -> Result<Vec<&'static str>> {
        Ok(vec![])
    }
}

struct NoRecords(Result<Vec<String>, &'static str>);

impl OwnRecords for NoRecords {
    async fn delete(&self) -> Result<Vec<String>> {
        self.0.clone().map_err(|line| anyhow!(line))
    }
}

fn links(names: &[&str]) -> FakeLinks {
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    FakeLinks { names: Mutex::new(names), stuck: "" }
}

/// A host with everything on it that an agent leaves, and things that are not its own.
fn host() -> (TempDir, Places) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for (path, what) in [
        ("bpffs/v1/maps/HOSTS", "ours"),
        ("bpffs/v1/links/ens33", "ours"),
        ("bpffs/v0/old", "ours"),
        ("state/endpoints/a.json", "ours"),
        ("state/endpoints/a.new", "ours"),
        ("run/ovnet.sock.lock", "ours"),
    ] {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, what).unwrap();
    }
    let places = Places {
        socket: root.join("run/ovnet.sock"),
        state_dir: root.join("state"),
        bpffs: root.join("bpffs"),
        plugin: root.join("plugins/ovnet.sock"),
    };
    drop(std::os::unix::net::UnixListener::bind(&places.socket).unwrap());
    (folder, places)
}

async fn cleanup(places: &Places, links: &FakeLinks, records: NoRecords) -> (String, Result<()>) {
    let mut out = Vec::new();
    let result = run(places, links, &records, &mut out).await;
    (String::from_utf8(out).unwrap(), result)
}

#[tokio::test]
async fn everything_goes_and_a_second_time_finds_nothing() {
    let (folder, places) = host();
    let links = links(&["lo", "ens33", "ovnet-vx", "ovnet01234567"]);
    let records = NoRecords(Ok(vec!["of host docker01".into()]));
    let (told, result) = cleanup(&places, &links, records).await;
    result.unwrap();
    assert_eq!(links.names().await.unwrap(), ["ens33", "lo"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{told}");
    for part in [
        "removed  record of host docker01\n",
        "removed  link ovnet-vx\n",
        "v1/maps/HOSTS\n",
        "endpoints/a.json\n",
        "removed  socket ",
    ] {
        assert!(told.contains(part), "{part} in {told}");
    }
    let (told, result) = cleanup(&places, &links, NoRecords(Ok(vec![]))).await;
    result.unwrap();
    assert_eq!(told, "nothing of ovnet is on this host\n");
}

#[tokio::test]
async fn what_is_not_ours_stays() {
    let (_folder, places) = host();
    let others = [
        places.bpffs.join("other/v1/pin"),
        places.bpffs.join("vx/pin"),
        places.state_dir.join("notes.txt"),
        places.state_dir.join("endpoints/readme"),
        places.socket.with_file_name("docker.sock"),
    ];
    for path in &others {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "not ours").unwrap();
    }
    cleanup(&places, &links(&[]), NoRecords(Ok(vec![]))).await.1.unwrap();
    assert!(others.iter().all(|path| path.exists()));
    assert!(!places.bpffs.join("v1").exists());
}

#[tokio::test]
async fn a_running_agent_is_refused_and_keeps_everything() {
    let (_folder, places) = host();
    let links = links(&["ovnet-vx"]);
    let _agent = Socket::bind(&places.socket, None).unwrap();
    let (told, result) = cleanup(&places, &links, NoRecords(Ok(vec![]))).await;
    let error = one_line(&result.unwrap_err());
    assert!(error.starts_with("cannot clean up while the agent runs: stop it first"), "{error}");
    assert_eq!(told, "");
    assert_eq!(links.names().await.unwrap(), ["ovnet-vx"]);
    assert!(places.bpffs.join("v1/maps/HOSTS").exists());
}

#[tokio::test]
async fn a_consul_that_does_not_answer_keeps_only_the_records() {
    let (folder, places) = host();
    let records = NoRecords(Err("connection refused"));
    let (told, result) = cleanup(&places, &links(&[]), records).await;
    result.unwrap();
    assert!(told.starts_with("kept     this host's records: connection refused;"), "{told}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn what_cannot_be_removed_does_not_keep_the_rest() {
    let (folder, places) = host();
    let links = FakeLinks { stuck: "ovnet-vx", ..links(&["ovnet-vx", "ovnet01234567"]) };
    let (_, result) = cleanup(&places, &links, NoRecords(Ok(vec![]))).await;
    assert_eq!(result.unwrap_err().to_string(), "delete link ovnet-vx: it is stuck");
    assert_eq!(links.names().await.unwrap(), ["ovnet-vx"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn records_of_this_host_are_deleted_and_nobody_elses() {
    let (service, fake) = fake::service(&["ov_net1"]);
    let mut other = service.attach(attach("ov_net1", "t1")).await.unwrap().record;
    (other.id, other.host, other.address) = ("b".into(), "docker02".into(), [10, 0, 0, 9].into());
    fake.put("ov_net1", other.clone());
    let own = RecordsOf { records: &fake, node: fake::NODE, host: || async { Ok(true) } };
    assert_eq!(
        own.delete().await.unwrap(),
        ["of host docker01", "of endpoint 10.0.0.2 in ov_net1"]
    );
    assert_eq!(fake.records(), [other]);
}
