//! `ovnet-agent docker-setup`: makes the agent the first name server of every container.
//!
//! Docker has no setting for the names of one network, but its resolver asks the servers of
//! daemon.json's `dns` in order and goes on to the next where one refuses. So the list becomes the
//! agent, and after it what containers have asked so far.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize as _;
use serde_json::{Map, Value};

use crate::{
    check::{Level, Row},
    config::{Dns, DockerSetup},
    docker::daemon::GWBRIDGE,
    durable,
    net::Net,
};

/// Where dockerd reads its configuration by default.
pub const DAEMON_JSON: &str = "/etc/docker/daemon.json";
/// How many servers Docker's resolver asks, and the C library's of a container without it.
const MOST_ASKED: usize = 3;
/// The list of plugins that Docker asks for leave, and the agent's name in it.
const GUARD: &str = "authorization-plugins";
const PLUGIN: &str = "ovnet";
/// The host's name servers, and those that systemd-resolved asks where it stands between.
const RESOLV_CONF: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// What becomes of daemon.json.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Plan {
    /// The text of the file; as it was where nothing is to change.
    text: String,
    /// The name servers, the agent first.
    dns: Vec<String>,
}

/// Shows the change, or makes it where that is asked for.
pub async fn run(options: &DockerSetup) -> Result<()> {
    let agent = match options.dns {
        Some(address) => address,
        None => gwbridge(&Net::open()?).await?.with_context(|| {
            format!(
                "there is no {GWBRIDGE} on this host yet: an agent that runs beside Docker makes it, \
                 or the first container on an ovnet network; or give the agent's address with --dns"
            )
        })?,
    };
    // A link to the file stays a link.
    let path = fs::canonicalize(&options.daemon_json).unwrap_or(options.daemon_json.clone());
    let shown = path.display();
    let before = read(&path)?;
    let host_servers = upstreams(RESOLV_CONF.map(|path| fs::read_to_string(path).ok()));
    let plan = plan(before.as_deref(), agent, &host_servers, options.guard)
        .with_context(|| format!("{shown} is not changed"))?;
    let before = before.unwrap_or_default();
    let too_many = too_many(&plan.dns);
    if plan.text == before {
        println!("nothing to change: {shown} has dns {:?}", plan.dns);
        too_many.inspect(|line| println!("{line}"));
        return Ok(());
    }
    if options.write {
        write(&path, &plan.text)?;
        println!("{shown} now has dns {:?}", plan.dns);
        too_many.inspect(|line| println!("{line}"));
        println!("restart Docker: systemctl restart docker");
    } else {
        print!("{}", difference(&before, &plan.text, &path));
        println!();
        too_many.inspect(|line| println!("{line}"));
        println!("nothing is changed yet: add --write to write it");
    }
    Ok(())
}

/// The row of `ovnet-agent check`; none on a host without Docker. Names are no condition for the
/// agent to run, so this never fails.
pub async fn row(net: &Net, dns: Dns) -> Option<Row> {
    let folder = Path::new(DAEMON_JSON).parent().is_some_and(Path::exists);
    if !folder && !Path::new("/run/docker.sock").exists() {
        return None;
    }
    let agent = match dns {
        Dns::At(address) => Some(address),
        Dns::Auto => gwbridge(net).await.ok().flatten(),
        Dns::Off => return None,
    };
    let servers = read(Path::new(DAEMON_JSON)).and_then(|text| {
        let file = parse(text.as_deref())?;
        servers(&file)
    });
    Some(judge(agent, servers))
}

fn judge(agent: Option<Ipv4Addr>, servers: Result<Vec<String>>) -> Row {
    let row = |level, value: String, advice: String| Row { item: "names", value, level, advice };
    let servers = match servers {
        Ok(servers) => servers,
        Err(error) => {
            let advice = format!("mend {DAEMON_JSON}: {error:#}");
            return row(Level::Warn, "daemon.json cannot be read".into(), advice);
        }
    };
    let value = match servers.as_slice() {
        [] => "daemon.json has no dns".into(),
        servers => format!("daemon.json has dns [{}]", servers.join(", ")),
    };
    let Some(agent) = agent else {
        let advice = format!(
            "the agent answers on {GWBRIDGE}, which it makes when it runs beside Docker: then run \
             `ovnet-agent docker-setup`"
        );
        return row(Level::Warn, value, advice);
    };
    if servers.first().is_some_and(|first| first.parse() == Ok(agent)) {
        return row(Level::Ok, value, String::new());
    }
    let advice = format!(
        "containers do not ask {agent} for names: `ovnet-agent docker-setup` shows what to change"
    );
    row(Level::Warn, value, advice)
}

/// The address of docker_gwbridge on this host.
async fn gwbridge(net: &Net) -> Result<Option<Ipv4Addr>> {
    let link = net.link(GWBRIDGE).await?;
    Ok(link.and_then(|link| link.addresses.first().map(|it| it.addr())))
}

fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some).with_context(|| format!("read {}", path.display())),
    }
}

/// The file as it is to be. `host_servers` are asked where the file names nobody but the agent;
/// with `guard` Docker asks the agent for leave before it removes a network.
fn plan(
    before: Option<&str>,
    agent: Ipv4Addr,
    host_servers: &[String],
    guard: bool,
) -> Result<Plan> {
    let mut file = parse(before)?;
    let mut dns = vec![agent.to_string()];
    let others = servers(&file)?;
    let others: Vec<String> = others.into_iter().filter(|it| it.parse() != Ok(agent)).collect();
    for server in if others.is_empty() { host_servers } else { &others } {
        if !dns.contains(server) {
            dns.push(server.clone());
        }
    }
    ensure!(
        dns.len() > 1,
        "the agent refuses what is no container's name, and neither the file nor {} names a \
         server that containers could ask then: add one to \"dns\" in the file",
        RESOLV_CONF[0]
    );
    let unchanged = file.clone();
    file.insert("dns".into(), dns.clone().into());
    if guard {
        let mut plugins = texts(&file, GUARD)?;
        if !plugins.iter().any(|plugin| plugin == PLUGIN) {
            plugins.push(PLUGIN.into());
        }
        file.insert(GUARD.into(), plugins.into());
    }
    let text = match before {
        Some(before) if file == unchanged => before.to_owned(),
        _ => pretty(&file, before.unwrap_or_default())?,
    };
    Ok(Plan { text, dns })
}

/// What to say where the list is longer than containers ask: with the agent before them, the last of
/// three servers is not asked any more.
fn too_many(dns: &[String]) -> Option<String> {
    let unasked = dns.get(MOST_ASKED..).filter(|unasked| !unasked.is_empty())?;
    Some(format!(
        "not asked: {}; containers ask the first {MOST_ASKED} servers only, so if one of these must \
         be asked, put it right after the agent",
        unasked.join(", ")
    ))
}

/// An absent or empty file is dockerd's default, an empty object.
fn parse(text: Option<&str>) -> Result<Map<String, Value>> {
    let text = text.filter(|text| !text.trim().is_empty()).unwrap_or("{}");
    match serde_json::from_str(text).context("it is no JSON: dockerd cannot read it either")? {
        Value::Object(file) => Ok(file),
        _ => bail!("it is no JSON object: dockerd cannot read it either"),
    }
}

/// The `dns` of the file.
fn servers(file: &Map<String, Value>) -> Result<Vec<String>> {
    texts(file, "dns")
}

/// A list of texts in the file; empty where there is none.
fn texts(file: &Map<String, Value>, key: &str) -> Result<Vec<String>> {
    let Some(list) = file.get(key) else { return Ok(Vec::new()) };
    let texts = list.as_array().map(|list| list.iter().map(|it| it.as_str().map(str::to_owned)));
    let texts: Option<Vec<String>> = texts.and_then(Iterator::collect);
    texts.with_context(|| format!("its {key:?} is no list of texts"))
}

/// As text, indented as the file was.
fn pretty(file: &Map<String, Value>, before: &str) -> Result<String> {
    let indented = before.lines().find(|line| line.starts_with([' ', '\t']));
    let indent = indented.map_or("  ", |line| &line[..line.len() - line.trim_start().len()]);
    let mut text = Vec::new();
    let format = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
    file.serialize(&mut serde_json::Serializer::with_formatter(&mut text, format))
        .context("write it as JSON")?;
    text.push(b'\n');
    String::from_utf8(text).context("write it as JSON")
}

/// The servers of the first of these files that names any a container can ask: a server on
/// loopback is another one inside a container, or none. IPv6 servers count only where there are
/// no others: most containers have no IPv6.
fn upstreams(files: [Option<String>; 2]) -> Vec<String> {
    for text in files.into_iter().flatten() {
        let lines = text.lines().map(|line| line.split_whitespace());
        let addresses = lines.filter_map(|mut words| match (words.next(), words.next()) {
            // With a zone, fe80::1%eth0, it does not parse: containers have other zones.
            (Some("nameserver"), Some(address)) => address.parse::<IpAddr>().ok(),
            _ => None,
        });
        let usable = addresses.filter(|it| !it.is_loopback() && !it.is_unspecified());
        let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = usable.partition(IpAddr::is_ipv4);
        let found = if v4.is_empty() { v6 } else { v4 };
        if !found.is_empty() {
            return found.iter().map(IpAddr::to_string).collect();
        }
    }
    Vec::new()
}

fn difference(before: &str, after: &str, path: &Path) -> String {
    let name = path.display().to_string();
    similar::TextDiff::from_lines(before, after)
        .unified_diff()
        .header(&name, &name)
        .missing_newline_hint(false)
        .to_string()
}

/// Replaces the file, so that there is always a whole one.
fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().context("the file is in no folder")?;
    let attributes = fs::metadata(path).ok();
    let mode = attributes.map_or(0o644, |it| it.permissions().mode() & 0o7777);
    fs::create_dir_all(folder)
        .with_context(|| format!("make {} (this needs root)", folder.display()))?;
    durable::replace(path, mode, text.as_bytes())
}

#[cfg(test)]
mod tests;
