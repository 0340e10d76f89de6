//! How headers are read, and checksums kept.

use ovnet_common::verdict::DropReason as Drop;

use crate::packet::{Address, Mac};

/// Sets the TOS byte.
pub(super) fn set_tos(frame: &mut [u8], tos: u8) {
    let before = [frame[14], frame[15]];
    frame[15] = tos;
    adjust(frame, 24, before, [before[0], tos]);
}

/// Corrects the checksum at `at` after a word of the data changed (RFC 1624 §3); one that was
/// wrong stays as wrong as it was.
pub(super) fn adjust(frame: &mut [u8], at: usize, old: [u8; 2], new: [u8; 2]) {
    let checksum = !word(frame, at).unwrap_or(0);
    let mut sum = u32::from(checksum);
    sum += u32::from(!u16::from_be_bytes(old)) + u32::from(u16::from_be_bytes(new));
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[at..at + 2].copy_from_slice(&(!sum).to_be_bytes()[2..]);
}

/// An IPv4 header.
pub(super) struct Header {
    pub(super) version_ihl: u8,
    pub(super) tos: u8,
    pub(super) length: u16,
    pub(super) fragment: u16,
    pub(super) protocol: u8,
    pub(super) source: Address,
    pub(super) destination: Address,
}

impl Header {
    /// `None` where the frame ends before, an error where it is no IPv4.
    pub(super) fn read(frame: &[u8], at: usize) -> Option<Result<Self, Drop>> {
        let header = bytes::<20>(frame, at)?;
        if header[0] >> 4 != 4 || header[0] & 15 < 5 {
            return Some(Err(Drop::BadIpHeader));
        }
        Some(Ok(Self {
            version_ihl: header[0],
            tos: header[1],
            length: u16::from_be_bytes([header[2], header[3]]),
            fragment: u16::from_be_bytes([header[6], header[7]]),
            protocol: header[9],
            source: bytes(&header, 12)?,
            destination: bytes(&header, 16)?,
        }))
    }

    pub(super) fn is_fragment(&self) -> bool {
        self.fragment & 0x3fff != 0
    }
}

/// An ARP request.
pub(super) struct Request {
    pub(super) sender_mac: Mac,
    pub(super) sender: Address,
    pub(super) target: Address,
}

impl Request {
    pub(super) fn read(frame: &[u8]) -> Result<Self, Drop> {
        let packet = bytes::<28>(frame, 14).ok_or(Drop::Truncated)?;
        if packet[..8] != [0, 1, 8, 0, 6, 4, 0, 1] {
            return Err(Drop::ArpUnanswered);
        }
        let fields = (bytes(&packet, 8), bytes(&packet, 14), bytes(&packet, 24));
        let (Some(sender_mac), Some(sender), Some(target)) = fields else {
            return Err(Drop::Truncated);
        };
        Ok(Self { sender_mac, sender, target })
    }

    pub(super) fn answer(&self, frame: &mut [u8], mac: Mac) {
        frame[..6].copy_from_slice(&self.sender_mac);
        frame[6..12].copy_from_slice(&mac);
        frame[21] = 2;
        frame[22..28].copy_from_slice(&mac);
        frame[28..32].copy_from_slice(&self.target);
        frame[32..38].copy_from_slice(&self.sender_mac);
        frame[38..42].copy_from_slice(&self.sender);
    }
}

pub(super) fn bytes<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at + N)?.try_into().ok()
}

pub(super) fn word(frame: &[u8], at: usize) -> Option<u16> {
    bytes(frame, at).map(u16::from_be_bytes)
}
