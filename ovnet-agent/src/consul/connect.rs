//! How Consul is reached: the forms of its address, TLS.

use std::{env, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use hyper014::client::connect::dns::Name;
use reqwest::{
    Certificate, Identity, Url,
    dns::{Addrs, Resolve, Resolving},
};

/// The name that must be in Consul's certificate, where it is not the one it is reached by.
const SERVER_NAME: &str = "CONSUL_TLS_SERVER_NAME";

/// How long connecting may take: enough for a lost SYN to be sent again, which is after 1 s.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The URL to talk to and the path that goes before the prefix.
pub(super) fn parse_address(address: &str) -> Result<(Url, String)> {
    let wrong = || {
        format!("Consul address {address:?} is not host:port, http(s)://… or consul://host:port")
    };
    // reqwest's Url knows default ports and paths of http only, so consul:// becomes one.
    let (spelled, default_port, path_is_prefix) = match address.split_once("://") {
        None => (format!("http://{address}"), true, false),
        Some(("consul", rest)) => (format!("http://{rest}"), true, true),
        Some(("http" | "https", _)) => (address.to_owned(), false, false),
        Some(_) => bail!("{}", wrong()),
    };
    let mut url = Url::parse(&spelled).with_context(wrong)?;
    ensure!(
        url.username().is_empty() && url.password().is_none(),
        "the Consul address holds credentials: put a token into CONSUL_HTTP_TOKEN instead"
    );
    ensure!(url.query().is_none() && url.fragment().is_none(), "{}", wrong());
    let path = url.path().trim_matches('/').to_owned();
    ensure!(path.is_empty() || path_is_prefix, "{}", wrong());
    url.set_path("");
    // A port of 80 that was spelled out looks like none to Url.
    let has_port = spelled.trim_end_matches('/').ends_with(":80") || spelled.contains(":80/");
    if default_port && url.port().is_none() && !has_port {
        url.set_port(Some(8500)).map_err(|()| anyhow!("{}", wrong()))?;
    }
    Ok((url, path))
}

/// The URL to be given to the client for one that was given by the user: `https://` to the name that
/// `CONSUL_TLS_SERVER_NAME` says, which [`build_http`] looks up as the user's.
pub(super) fn connect_as(url: &Url) -> Result<Url> {
    let mut url = url.clone();
    if let Some(name) = server_name(&url) {
        let wrong = || format!("{SERVER_NAME} {name:?} is not the name of a server");
        // An address is not looked up, so it could not be replaced by another one.
        ensure!(name.parse::<std::net::IpAddr>().is_err(), "{}", wrong());
        url.set_host(Some(&name)).with_context(wrong)?;
    }
    Ok(url)
}

fn server_name(url: &Url) -> Option<String> {
    let name = env::var(SERVER_NAME).ok().filter(|name| !name.is_empty())?;
    (url.scheme() == "https").then_some(name)
}

/// What to do about a failed handshake with `consul`, from rustls' words for it; `None` for other
/// failures.
pub(super) fn advice(consul: &str, cause: &str) -> Option<&'static str> {
    let says = |words: &str| cause.contains(words);
    if says("invalid peer certificate") {
        return Some(if says("NotValidForName") {
            "its certificate is for another name, which CONSUL_TLS_SERVER_NAME may give"
        } else if says("UnknownIssuer") {
            "its certificate is not signed by the CA of CONSUL_CACERT"
        } else if says("Expired") {
            "its certificate has expired"
        } else {
            "its certificate cannot be accepted"
        });
    }
    // In TLS 1.3 the handshake is over for us before the server looks at our certificate. What it
    // says then may come after we have written to a connection that it has closed.
    let closed = ["channel closed", "connection closed", "Connection reset", "Broken pipe"];
    let shows_none = env::var_os("CONSUL_CLIENT_CERT").is_none_or(|path| path.is_empty());
    let maybe = consul.starts_with("https:") && shows_none && closed.iter().any(|it| says(it));
    (maybe || says("received fatal alert")).then_some(
        "it may want a certificate that its CA signed in CONSUL_CLIENT_CERT and CONSUL_CLIENT_KEY",
    )
}

/// Looks up one name whatever is asked for.
struct Always(String);

impl Resolve for Always {
    fn resolve(&self, _: Name) -> Resolving {
        let host = self.0.clone();
        Box::pin(async move {
            // The port is the URL's.
            let found: Vec<SocketAddr> =
                tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            let found: Addrs = Box::new(found.into_iter());
            Ok(found)
        })
    }
}

/// The HTTP client for this URL, with certificates as the usual variables name them.
pub(super) fn build_http(url: &Url) -> Result<reqwest::Client> {
    let file = |variable: &str| -> Result<Option<Vec<u8>>> {
        match env::var_os(variable).filter(|path| !path.is_empty()) {
            None => Ok(None),
            Some(path) => std::fs::read(&path)
                .with_context(|| format!("read {} of {variable}", path.display()))
                .map(Some),
        }
    };
    let verify = env::var("CONSUL_HTTP_SSL_VERIFY")
        .map_or(true, |verify| !matches!(verify.as_str(), "false" | "0" | "f" | "FALSE" | "False"));
    let mut builder = reqwest::Client::builder()
        .use_rustls_tls()
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_keepalive(Duration::from_secs(15))
        .tcp_nodelay(true)
        // Consul is a neighbour, not something on the far side of the machine's web proxy.
        .no_proxy()
        .danger_accept_invalid_certs(!verify);
    if let Some(pem) = file("CONSUL_CACERT")? {
        let ca = Certificate::from_pem(&pem).context("read the certificate of CONSUL_CACERT")?;
        // Whoever names a CA means this one and not every other, too.
        builder = builder.tls_built_in_root_certs(false).add_root_certificate(ca);
    }
    if server_name(url).is_some() {
        let host = url.host_str().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        builder = builder.dns_resolver(Arc::new(Always(host)));
    }
    match (file("CONSUL_CLIENT_CERT")?, file("CONSUL_CLIENT_KEY")?) {
        (None, None) => {}
        (Some(mut certificate), Some(key)) => {
            certificate.push(b'\n');
            certificate.extend(key);
            let identity = Identity::from_pem(&certificate)
                .context("read the certificate and key of CONSUL_CLIENT_CERT and _KEY")?;
            builder = builder.identity(identity);
        }
        _ => bail!("CONSUL_CLIENT_CERT and CONSUL_CLIENT_KEY need each other: set both"),
    }
    Ok(builder.build()?)
}

#[cfg(test)]
mod tests {
    use crate::consul::Consul;

    #[test]
    fn every_form_of_address_is_understood() {
        for (address, described, prefix) in [
            ("192.168.1.11:8500", "192.168.1.11:8500", "ovnet/v1/"),
            ("consul.example.org", "consul.example.org:8500", "ovnet/v1/"),
            ("http://127.0.0.1:8500/", "127.0.0.1:8500", "ovnet/v1/"),
            ("https://consul:8501", "https://consul:8501", "ovnet/v1/"),
            ("consul://c1:8500", "c1:8500", "ovnet/v1/"),
            ("consul://c1:8500/docker/net/", "c1:8500", "docker/net/ovnet/v1/"),
            ("[::1]:8500", "[::1]:8500", "ovnet/v1/"),
        ] {
            let consul = Consul::new(address, "/ovnet/v1/", "docker01").unwrap();
            assert_eq!(consul.describe(), described, "{address}");
            assert_eq!(consul.prefix(), prefix, "{address}");
        }
    }

    #[test]
    fn an_address_that_cannot_be_one_is_refused_in_one_line() {
        for address in
            ["", "etcd://a:1", "a:b:c", "http://u:secret@c1:8500", "c1:99999", "http://c1/x"]
        {
            let error = Consul::new(address, "ovnet/v1", "docker01").err().unwrap();
            let line = format!("{error:#}");
            assert!(!line.contains('\n') && !line.contains("secret"), "{line}");
        }
        assert!(Consul::new("c1:8500", "a/../b", "docker01").is_err());
        assert!(Consul::new("c1:8500", "ovnet/v1", "a/b").is_err());
    }
}
