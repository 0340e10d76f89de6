//! Veth pairs that were only half made are taken back.

use netlink_packet_route::link::{LinkAttribute, LinkMessage};

use super::Net;

/// Takes a pair back when making it failed, or when the future that makes it is dropped half way.
/// Armed before the pair is asked for: the request may be carried out after the future is gone.
pub(super) struct Undo {
    net: Option<Net>,
    name: String,
    host_mac: [u8; 6],
}

impl Undo {
    /// Before the pair is asked for; it is told from others of the name by `host_mac`.
    pub(super) fn new(net: &Net, name: &str, host_mac: [u8; 6]) -> Self {
        Self { net: Some(net.clone()), name: name.to_owned(), host_mac }
    }

    /// The pair was made, or is taken back now.
    pub(super) async fn settle(mut self, keep: bool) {
        if keep {
            self.net = None;
        } else if let Some(net) = &self.net {
            take_back(net, &self.name, self.host_mac).await;
            self.net = None;
        }
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        let Some(net) = self.net.take() else { return };
        let (name, host_mac) = (std::mem::take(&mut self.name), self.host_mac);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            // The same socket carries this after the request that made the pair, in that order.
            runtime.spawn(async move { take_back(&net, &name, host_mac).await });
        }
    }
}

/// A locally administered unicast address.
pub(super) fn random_mac() -> [u8; 6] {
    let mut mac: [u8; 6] = rand::random();
    mac[0] = mac[0] & 0xfc | 0x02;
    mac
}

async fn take_back(net: &Net, name: &str, host_mac: [u8; 6]) {
    let result = async {
        match net.space().link_message(name).await? {
            Some(message) if mac_is(&message, host_mac) => {
                net.space().delete(message.header.index, name).await
            }
            _ => Ok(()),
        }
    };
    if let Err(error) = result.await {
        tracing::warn!("an endpoint could not be made, nor taken back: {error:#}");
    }
}

fn mac_is(message: &LinkMessage, mac: [u8; 6]) -> bool {
    message
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::Address(bytes) if *bytes == mac))
}
