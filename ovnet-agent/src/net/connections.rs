//! The kernel's connection tracking: the only place that speaks ctnetlink.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStream, TryStreamExt as _};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage, ConntrackMessageType, IPTuple, Tuple},
};
use nix::errno::Errno;
use rtnetlink::{
    packet_core::{
        DefaultNla, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
        NetlinkPayload, Nla as _,
    },
    proto::{self, ConnectionHandle},
    sys::{SocketAddr, protocols::NETLINK_NETFILTER},
};

use super::Net;

/// `CTA_ID`, by which the kernel knows that it deletes the connection meant.
const CTA_ID: u16 = 12;
/// `CTA_FILTER`: the kernel lists only what is like the tuple given. One before 5.8 lists all.
const CTA_FILTER: u16 = 25;
/// `CTA_FILTER_ORIG_FLAGS` and `CTA_FILTER_REPLY_FLAGS`: which parts of the tuples count.
const CTA_FILTER_FLAGS: [u16; 2] = [1, 2];
/// `CTA_FILTER_FLAG(CTA_IP_SRC)`
const BY_SOURCE: u32 = 1;
/// How long it may take: who asks has other things to do than to wait for a table of millions.
const PATIENCE: Duration = Duration::from_secs(5);
/// `NLA_F_NESTED`
const NESTED: u16 = 1 << 15;

impl Net {
    /// Has the kernel forget the connections that begin at an address, or lead to it once their
    /// destination is translated; how many. For an address that is nobody's any more: whoever has
    /// it next would be sent what others still say on them.
    pub async fn forget_connections(&self, address: Ipv4Addr) -> Result<usize> {
        let forget = async {
            let mut handle = self.ctnetlink().await?;
            let mut forgotten = 0;
            for direction in [Direction::Original, Direction::Reply] {
                for connection in list(&mut handle, direction, address).await? {
                    forgotten += usize::from(delete(&mut handle, connection).await?);
                }
            }
            anyhow::Ok(forgotten)
        };
        let what = || format!("forget the connections of {address}");
        let forgotten = tokio::time::timeout(PATIENCE, forget).await;
        forgotten.map_err(anyhow::Error::from).with_context(what)?.with_context(what)
    }

    async fn ctnetlink(&self) -> Result<ConnectionHandle<NetfilterMessage>> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle) = self
            .space()
            .namespace
            .inside(move || {
                let _entered = runtime.enter();
                let (connection, handle, _) =
                    proto::new_connection::<NetfilterMessage>(NETLINK_NETFILTER)
                        .context("open a netlink socket to connection tracking")?;
                Ok((connection, handle))
            })
            .await?;
        // Ends with the handle.
        tokio::spawn(connection);
        Ok(handle)
    }
}

/// Of which of a connection's two tuples the source is meant.
#[derive(Clone, Copy)]
enum Direction {
    /// As whoever began it sends: before any translation.
    Original,
    /// As it is answered: its source is where the destination was translated to.
    Reply,
}

/// What the connections are deleted by whose tuple of this direction has the address as its source.
async fn list(
    handle: &mut ConnectionHandle<NetfilterMessage>,
    direction: Direction,
    address: Ipv4Addr,
) -> Result<Vec<Vec<ConntrackAttribute>>> {
    let source = vec![Tuple::Ip(vec![IPTuple::SourceAddress(address.into())])];
    let (tuple, flags) = match direction {
        Direction::Original => (ConntrackAttribute::CtaTupleOrig(source), [BY_SOURCE, 0]),
        Direction::Reply => (ConntrackAttribute::CtaTupleReply(source), [0, BY_SOURCE]),
    };
    // As attributes of no type: those of the crate lose the mark of a nested one it does not know.
    let mut value = vec![0; tuple.value_len()];
    tuple.emit_value(&mut value);
    let tuple = DefaultNla::new(tuple.kind() | NESTED, value);
    let message_type = ConntrackMessageType::Get.into();
    let question = ConntrackMessage::Other { message_type, attributes: vec![tuple, filter(flags)] };
    let mut answers = ask(handle, question, NLM_F_REQUEST | NLM_F_DUMP)?;
    let mut found = Vec::new();
    while let Some(answer) = answers.try_next().await? {
        if let ConntrackMessage::New(mut attributes) = answer
            && source_of(&attributes, direction) == Some(address)
        {
            // There may be many: only what they are deleted by is kept.
            attributes.retain(|attribute| match attribute {
                ConntrackAttribute::CtaTupleOrig(_) => true,
                ConntrackAttribute::Other(other) => other.kind() == CTA_ID,
                _ => false,
            });
            found.push(attributes);
        }
    }
    Ok(found)
}

/// Whether there was such a connection still.
async fn delete(
    handle: &mut ConnectionHandle<NetfilterMessage>,
    connection: Vec<ConntrackAttribute>,
) -> Result<bool> {
    let question = ConntrackMessage::Delete(connection);
    let mut answers = ask(handle, question, NLM_F_REQUEST | NLM_F_ACK)?;
    match answers.try_next().await {
        Ok(_) => Ok(true),
        Err(error) if error.downcast_ref::<Errno>() == Some(&Errno::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Sends a question; the answers end with the kernel's error, if it has one.
fn ask(
    handle: &mut ConnectionHandle<NetfilterMessage>,
    question: ConntrackMessage,
    flags: u16,
) -> Result<impl TryStream<Ok = ConntrackMessage, Error = anyhow::Error> + Unpin> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let to = NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0);
    let message = NetlinkMessage::new(header, NetfilterMessage::new(to, question).into());
    let answers = handle.request(message, SocketAddr::new(0, 0)).context("ask the kernel")?;
    Ok(answers.filter_map(|answer| std::future::ready(understood(answer.payload))))
}

fn understood(payload: NetlinkPayload<NetfilterMessage>) -> Option<Result<ConntrackMessage>> {
    match payload {
        NetlinkPayload::InnerMessage(NetfilterMessage {
            inner: NetfilterMessageInner::Conntrack(message),
            ..
        }) => Some(Ok(message)),
        NetlinkPayload::Error(error) => {
            let code = error.code?;
            Some(Err(Errno::from_raw(-code.get()).into()))
        }
        _ => None,
    }
}

/// `CTA_FILTER`, with the flags for the original tuple and for the reply's.
fn filter(flags: [u32; 2]) -> DefaultNla {
    let mut value = Vec::new();
    for (kind, flags) in CTA_FILTER_FLAGS.into_iter().zip(flags) {
        // An attribute of four bytes: its length with its header, its kind, and the flags.
        value.extend(8_u16.to_ne_bytes());
        value.extend(kind.to_ne_bytes());
        value.extend(flags.to_ne_bytes());
    }
    DefaultNla::new(CTA_FILTER | NESTED, value)
}

fn source_of(attributes: &[ConntrackAttribute], direction: Direction) -> Option<Ipv4Addr> {
    attributes.iter().find_map(|attribute| {
        let tuple = match (attribute, direction) {
            (ConntrackAttribute::CtaTupleOrig(tuple), Direction::Original) => tuple,
            (ConntrackAttribute::CtaTupleReply(tuple), Direction::Reply) => tuple,
            _ => return None,
        };
        let parts = tuple.iter().filter_map(|part| match part {
            Tuple::Ip(addresses) => Some(addresses),
            _ => None,
        });
        parts.flatten().find_map(|address| match address {
            IPTuple::SourceAddress(IpAddr::V4(source)) => Some(*source),
            _ => None,
        })
    })
}
