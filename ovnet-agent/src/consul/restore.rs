//! Networks as they must be: put back where Consul lost them or somebody wrote over them, removed
//! where nobody should know of them.

use std::time::Instant;

use anyhow::{Result, anyhow, bail, ensure};

use super::{
    client::Consul,
    networks::{CONTENTION_LIMIT, encode, ensure_time_left, network_key, subnet_key, vni_key},
    schema::NetworkRecord,
    sentinel,
    transaction::Operation,
    watch::backoff,
};
use crate::ipam;

impl Consul {
    /// Puts back a network whose records were lost with everything in Consul, exactly as `record`
    /// has it. Nothing to do where it is there; fails where its name, VNI or subnet now belongs to
    /// another network.
    pub async fn restore_network(&self, record: &NetworkRecord) -> Result<()> {
        let deadline = Instant::now() + CONTENTION_LIMIT;
        loop {
            let taken = self.taken().await?;
            match taken.networks.get(&record.name) {
                Some(Ok(existing)) if existing.id == record.id => return Ok(()),
                Some(_) => bail!("network {} is another one now", record.name),
                None => {}
            }
            ensure!(
                !taken.vnis.contains(&record.vni),
                "VNI {} of network {} belongs to another network now",
                record.vni,
                record.name
            );
            ipam::check_subnet(record.subnet, &taken.subnets, &[])?;
            let (id, guard) = (record.id.as_bytes(), taken.subnets_sentinel.as_ref());
            let operations = vec![
                Operation::cas(network_key(&record.name), encode(record)?, 0),
                Operation::cas(vni_key(record.vni), id.to_vec(), 0),
                Operation::cas(subnet_key(record.subnet), id.to_vec(), 0),
                Operation::cas(
                    sentinel::key("subnets/"),
                    sentinel::touched(guard),
                    guard.map_or(0, |guard| guard.modify_index),
                ),
            ];
            let lost = match self.transact(operations).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(conflict)) => anyhow!("other hosts were faster: {conflict}"),
                Err(error) => error,
            };
            ensure_time_left(deadline, lost, &format!("restore network {}", record.name)).await?;
        }
    }

    /// Writes a network's record again that somebody else has written to, as it was before.
    pub async fn rewrite_network(&self, record: &NetworkRecord) -> Result<()> {
        let key = network_key(&record.name);
        let Some(entry) = self.get(&key).await? else { return Ok(()) };
        let write = Operation::cas(key.clone(), encode(record)?, entry.modify_index);
        let written = self.transact(vec![write]).await?;
        // Every host with an endpoint there does this; the first one is enough.
        let _ = written;
        Ok(())
    }

    /// Removes a network that may have been made although whoever asked for it was told that it was
    /// not, as soon as Consul says so or not.
    pub(super) fn unmake_later(&self, id: String) {
        let consul = self.clone();
        tokio::spawn(async move {
            for failures in 0.. {
                tokio::time::sleep(backoff(failures)).await;
                let Ok(found) = consul.find_network(&id).await else { continue };
                let Some((record, _)) = found else { return };
                if consul.remove_network(&id).await.is_ok() {
                    tracing::info!(network = record.name, "a network that was refused is removed");
                    return;
                }
                // Somebody has found and used it meanwhile.
                if consul.endpoints(&id).await.is_ok_and(|endpoints| !endpoints.is_empty()) {
                    return;
                }
            }
        });
    }
}
