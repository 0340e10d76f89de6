//! The guard: Docker drops what a network driver says against `docker network rm` (libnetwork
//! `network.deleteNetwork` logs it and goes on), so the order has to be stopped before it begins.
//! Where daemon.json names `ovnet` among its `authorization-plugins`, Docker asks for leave here.
//!
//! Without it nothing is lost: the network stays, and this host's Docker gets it again. So it is no
//! matter of safety that a name spelt in another way (`ov%5Fnet1`) is let through.

use anyhow::Result;

use super::Driver;
use crate::{
    consul::schema::EndpointRecord,
    docker::{book::Bound, plugin::types::Authorization},
    service::{Records, Wiring, one_line},
};

impl<R: Records, W: Wiring> Driver<R, W> {
    /// `AuthZPlugin.AuthZReq`: why a request to Docker's API is refused; `None` where it is not.
    /// Only the removal of a network that other hosts use is, or may be.
    pub async fn objection(&self, wanted: &Authorization) -> Option<String> {
        let bound = self.removed_by(wanted)?;
        match self.users_elsewhere(&bound).await {
            Ok(users) => {
                let first = users.first()?;
                let name = first.names.first().unwrap_or(&first.id);
                let others = match users.len() - 1 {
                    0 => String::new(),
                    others => format!(", and {others} more"),
                };
                Some(format!(
                    "network {} is in use: host {} has {name} ({}) in it{others}",
                    bound.network.name, first.host, first.address
                ))
            }
            Err(error) => Some(one_line(&error)),
        }
    }

    /// The network that a user's request would remove.
    fn removed_by(&self, wanted: &Authorization) -> Option<Bound> {
        let named = network_of(wanted)?;
        let pages = self.book().pages();
        let bound = pages.bound.values().filter(|bound| !pages.removing.contains(&bound.docker));
        // As Docker reads it: a name, an id, or the beginning of one id.
        let by_name = bound.clone().find(|it| it.network.name == named || it.docker == named);
        let mut by_start = bound.filter(|it| it.docker.starts_with(named));
        let found = by_name.or_else(|| by_start.next().filter(|_| by_start.next().is_none()));
        found.filter(|it| !it.network.name.is_empty()).cloned()
    }

    /// Endpoints of other hosts; what this one's Docker has it refuses to leave by itself.
    async fn users_elsewhere(&self, bound: &Bound) -> Result<Vec<EndpointRecord>> {
        let what = format!("see who uses network {}", bound.network.name);
        let mut users = self.in_time(&what, self.records().endpoints(&bound.network.id)).await?;
        users.retain(|it| it.host != self.shared.service.node());
        Ok(users)
    }
}

/// The network in `DELETE /v1.41/networks/NAME`.
fn network_of(wanted: &Authorization) -> Option<&str> {
    if wanted.method != "DELETE" {
        return None;
    }
    let path = wanted.uri.split('?').next().unwrap_or_default();
    let (version, network) = path.split_once("/networks/")?;
    let versioned = version.strip_prefix("/v").is_some_and(|it| !it.contains('/'));
    ((version.is_empty() || versioned) && !network.is_empty() && !network.contains('/'))
        .then_some(network)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_removal_of_a_network_is_read() {
        let network = |method: &str, uri: &str| {
            let wanted = Authorization { method: method.into(), uri: uri.into() };
            network_of(&wanted).map(str::to_owned)
        };
        assert_eq!(network("DELETE", "/v1.41/networks/ov_net1"), Some("ov_net1".into()));
        assert_eq!(network("DELETE", "/networks/ov_net1?force=1"), Some("ov_net1".into()));
        for (method, uri) in [
            ("GET", "/v1.41/networks/ov_net1"),
            ("DELETE", "/v1.41/containers/networks/x"),
            ("DELETE", "/v1.41/networks/"),
            ("POST", "/v1.41/networks/prune"),
            ("DELETE", ""),
        ] {
            assert_eq!(network(method, uri), None, "{method} {uri}");
        }
    }
}
