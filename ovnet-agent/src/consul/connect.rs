//! How Consul is reached: the forms of its address, TLS.

use std::{env, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use reqwest::{Certificate, Identity, Url};

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

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

/// The HTTP client, with certificates as the usual variables name them.
pub(super) fn build_http() -> Result<reqwest::Client> {
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
        builder = builder.add_root_certificate(ca);
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
