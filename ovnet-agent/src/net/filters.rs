//! The BPF programs on interfaces, as far as their links do not tell: clsact filters are none, and an
//! XDP link that was detached by force says nothing of it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use futures::TryStreamExt as _;
use netlink_packet_route::{
    link::{LinkAttribute, LinkMessage, LinkXdp},
    tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption},
};
use nix::errno::Errno;

use super::{
    Net,
    link::{is, plain},
};

/// A program behind a filter: its name as the filter tells it, and its id.
pub type FilterProgram = (String, u32);

/// The programs on this host's interfaces, by ifindex.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Those of clsact filters at ingress.
    pub filters: BTreeMap<u32, BTreeSet<FilterProgram>>,
    /// Ids of XDP programs.
    pub xdp: BTreeMap<u32, u32>,
}

impl Net {
    /// What programs there are on which interfaces.
    pub async fn hooks(&self) -> Result<Hooks> {
        let links = self.space().link_messages().await?;
        let xdp = links.iter().filter_map(|it| Some((it.header.index, xdp_of(it)?))).collect();
        Ok(Hooks { filters: self.ingress_filters().await?, xdp })
    }

    /// The programs of the clsact filters at ingress, by ifindex. Interfaces without any are left
    /// out, and so are filters that are no BPF program.
    async fn ingress_filters(&self) -> Result<BTreeMap<u32, BTreeSet<FilterProgram>>> {
        let space = self.space();
        let qdiscs: Vec<TcMessage> = {
            let _alone = space.dumping().await;
            let listed = space.rtnetlink.qdisc().get().execute().try_collect();
            listed.await.map_err(plain).context("list the qdiscs")?
        };
        let mut filters = BTreeMap::new();
        for qdisc in qdiscs.iter().filter(|it| is_clsact(it)) {
            let index = qdisc.header.index;
            let _alone = space.dumping().await;
            let listed = space.rtnetlink.traffic_filter(index).get().ingress().execute();
            let listed: Vec<TcMessage> = match listed.try_collect().await {
                Ok(listed) => listed,
                // An interface that went meanwhile has none.
                Err(error) if is(&error, Errno::ENODEV) => continue,
                Err(error) => {
                    return Err(plain(error))
                        .with_context(|| format!("list the filters of interface {index}"));
                }
            };
            let programs: BTreeSet<FilterProgram> = listed.iter().filter_map(program_of).collect();
            if let (Ok(index), false) = (u32::try_from(index), programs.is_empty()) {
                filters.insert(index, programs);
            }
        }
        Ok(filters)
    }
}

fn xdp_of(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Xdp(settings) => settings.iter().find_map(|setting| match setting {
            LinkXdp::ProgId(id) if *id != 0 => Some(*id),
            _ => None,
        }),
        _ => None,
    })
}

fn is_clsact(qdisc: &TcMessage) -> bool {
    qdisc.attributes.iter().any(|it| matches!(it, TcAttribute::Kind(kind) if kind == "clsact"))
}

fn program_of(filter: &TcMessage) -> Option<FilterProgram> {
    let options = filter.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let (mut name, mut id) = (None, None);
    for option in options {
        match option {
            TcOption::Bpf(TcFilterBpfOption::ProgName(it)) => name = Some(it.clone()),
            TcOption::Bpf(TcFilterBpfOption::ProgId(it)) => id = Some(*it),
            _ => {}
        }
    }
    Some((name?, id?))
}
