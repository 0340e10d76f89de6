use super::*;

const AGENT: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);

fn planned(before: Option<&str>, host: &[&str]) -> Result<Plan> {
    let host: Vec<String> = host.iter().map(|it| it.to_string()).collect();
    plan(before, AGENT, &host, false)
}

fn why(before: &str, host: &[&str]) -> String {
    format!("{:#}", planned(Some(before), host).unwrap_err())
}

#[test]
fn a_host_without_daemon_json_gets_one() {
    for before in [None, Some(""), Some("\n")] {
        let plan = planned(before, &["192.168.1.1", "192.168.1.2"]).unwrap();
        assert_eq!(
            plan.text,
            "{\n  \"dns\": [\n    \"172.18.0.1\",\n    \"192.168.1.1\",\n    \"192.168.1.2\"\n  ]\n}\n"
        );
    }
}

#[test]
fn everything_else_is_kept_in_its_order_and_indentation() {
    let before = "{\n\t\"log-driver\": \"journald\",\n\t\"live-restore\": true,\n\t\"bip\": \"172.17.0.1/24\"\n}\n";
    let plan = planned(Some(before), &["192.168.1.1"]).unwrap();
    let expected = before.replace(
        "/24\"\n",
        "/24\",\n\t\"dns\": [\n\t\t\"172.18.0.1\",\n\t\t\"192.168.1.1\"\n\t]\n",
    );
    assert_eq!(plan.text, expected);
    let shown = difference(before, &plan.text, Path::new("/etc/docker/daemon.json"));
    let changed: Vec<&str> = shown.lines().filter(|it| it.starts_with(['+', '-'])).collect();
    assert_eq!(
        changed,
        [
            "--- /etc/docker/daemon.json",
            "+++ /etc/docker/daemon.json",
            "-\t\"bip\": \"172.17.0.1/24\"",
            "+\t\"bip\": \"172.17.0.1/24\",",
            "+\t\"dns\": [",
            "+\t\t\"172.18.0.1\",",
            "+\t\t\"192.168.1.1\"",
            "+\t]",
        ]
    );
}

#[test]
fn servers_of_the_file_stay_and_those_of_the_host_are_not_added() {
    let dns = |before: &str| planned(Some(before), &["192.168.1.1"]).unwrap().dns;
    assert_eq!(dns(r#"{"dns":["9.9.9.9","8.8.8.8"]}"#), ["172.18.0.1", "9.9.9.9", "8.8.8.8"]);
    assert_eq!(dns(r#"{"dns":["9.9.9.9","172.18.0.1"]}"#), ["172.18.0.1", "9.9.9.9"]);
    assert_eq!(dns(r#"{"dns":["9.9.9.9","9.9.9.9"]}"#), ["172.18.0.1", "9.9.9.9"]);
    assert_eq!(dns(r#"{"dns":[]}"#), ["172.18.0.1", "192.168.1.1"]);
    assert_eq!(dns(r#"{"dns":["172.18.0.1"]}"#), ["172.18.0.1", "192.168.1.1"]);
}

#[test]
fn servers_that_nobody_asks_any_more_are_named() {
    let said = |before| too_many(&planned(Some(before), &["192.168.1.1"]).unwrap().dns);
    assert_eq!(said(r#"{"dns":["9.9.9.9","8.8.8.8"]}"#), None);
    let line = said(r#"{"dns":["9.9.9.9","8.8.8.8","1.1.1.1"]}"#).unwrap();
    assert!(line.starts_with("not asked: 1.1.1.1;") && !line.contains("9.9.9.9"), "{line}");
    // The agent may be in the list already.
    let line = said(r#"{"dns":["172.18.0.1","a","b","c","d"]}"#).unwrap();
    assert!(line.starts_with("not asked: c, d;"), "{line}");
}

#[test]
fn a_second_time_changes_nothing_not_even_spaces() {
    for before in [None, Some("{\"debug\" :true, \"dns\":[\"9.9.9.9\"]}")] {
        let once = planned(before, &["192.168.1.1"]).unwrap();
        assert_eq!(planned(Some(&once.text), &["10.9.9.9"]).unwrap(), once);
    }
    let by_hand = "{ \"dns\": [\"172.18.0.1\", \"9.9.9.9\"] }";
    assert_eq!(planned(Some(by_hand), &[]).unwrap().text, by_hand);
}

#[test]
fn what_dockerd_could_not_read_is_refused() {
    assert!(why("{", &["9.9.9.9"]).contains("no JSON"));
    assert!(why("[]", &["9.9.9.9"]).contains("no JSON object"));
    assert!(why("// x\n{}", &["9.9.9.9"]).contains("no JSON"));
    for dns in [r#""9.9.9.9""#, "[1]", "{}", "null"] {
        let file = format!("{{\"dns\":{dns}}}");
        assert!(why(&file, &["9.9.9.9"]).contains("no list of texts"), "{dns}");
    }
}

#[test]
fn a_list_of_the_agent_alone_is_refused() {
    assert!(why("{}", &[]).contains("add one to \"dns\""));
    assert!(why(r#"{"dns":["172.18.0.1"]}"#, &["172.18.0.1"]).contains("add one"));
}

#[test]
fn the_host_s_servers_are_those_a_container_can_ask() {
    let from = |first: &str, second: Option<&str>| {
        upstreams([Some(first.to_owned()), second.map(str::to_owned)])
    };
    let stub = "# systemd\nnameserver 127.0.0.53\noptions edns0\nsearch example.org\n";
    let real = "nameserver 192.168.1.1\nnameserver 2001:db8::1\nnameserver fe80::1%eth0\n";
    assert_eq!(from(stub, Some(real)), ["192.168.1.1"]);
    assert_eq!(from("nameserver 10.1.1.1\nnameserver ::1", Some(real)), ["10.1.1.1"]);
    assert_eq!(from("nameserver 2001:db8::1\n", None), ["2001:db8::1"]);
    assert!(from(stub, None).is_empty());
    assert!(from("nameserver\nnameserver x\n;nameserver 1.1.1.1\n", None).is_empty());
    assert!(upstreams([None, None]).is_empty());
}

#[test]
fn the_check_says_who_is_asked_first() {
    let servers = |list: &[&str]| Ok(list.iter().map(|it| it.to_string()).collect());
    let good = judge(Some(AGENT), servers(&["172.18.0.1", "9.9.9.9"]));
    assert_eq!((good.level, good.advice.as_str()), (Level::Ok, ""));
    assert_eq!(good.value, "daemon.json has dns [172.18.0.1, 9.9.9.9]");
    let second = judge(Some(AGENT), servers(&["9.9.9.9", "172.18.0.1"]));
    assert_eq!(second.level, Level::Warn);
    assert!(second.advice.contains("docker-setup"));
    assert_eq!(judge(Some(AGENT), servers(&[])).value, "daemon.json has no dns");
    assert!(judge(None, servers(&["9.9.9.9"])).advice.contains(GWBRIDGE));
    assert_eq!(judge(Some(AGENT), parse(Some("{")).map(|_| Vec::new())).level, Level::Warn);
}

#[tokio::test]
async fn the_file_is_shown_first_then_written_and_then_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("daemon.json");
    let before = "{\n  \"dns\": [\"9.9.9.9\"]\n}\n";
    fs::write(&path, before).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let link = folder.path().join("link.json");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let options = |write| {
        let daemon_json = link.clone();
        DockerSetup { daemon_json, dns: Some(AGENT), guard: false, write }
    };

    run(&options(false)).await.unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), before);
    for _ in 0..2 {
        run(&options(true)).await.unwrap();
        let file = parse(Some(&fs::read_to_string(&path).unwrap())).unwrap();
        assert_eq!(servers(&file).unwrap(), ["172.18.0.1", "9.9.9.9"]);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
    }
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left");
}

#[test]
fn a_file_is_made_with_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("docker").join("daemon.json");
    write(&path, "{}\n").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "{}\n");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o644);
}

#[test]
fn the_guard_is_added_to_the_plugins_there_are() {
    let guarded = |before| plan(Some(before), AGENT, &[], true);
    let added = guarded(r#"{"dns": ["172.18.0.1", "9.9.9.9"]}"#).unwrap();
    let file = parse(Some(&added.text)).unwrap();
    assert_eq!(texts(&file, GUARD).unwrap(), [PLUGIN]);
    let before = r#"{"dns": ["172.18.0.1", "9.9.9.9"], "authorization-plugins": ["other"]}"#;
    let added = guarded(before).unwrap();
    assert_eq!(texts(&parse(Some(&added.text)).unwrap(), GUARD).unwrap(), ["other", PLUGIN]);
    // Without being asked for it stays as it is, and twice is once.
    assert_eq!(planned(Some(before), &[]).unwrap().text, before);
    assert_eq!(guarded(&added.text).unwrap().text, added.text);
    guarded(r#"{"dns": ["9.9.9.9"], "authorization-plugins": "ovnet"}"#).unwrap_err();
}
