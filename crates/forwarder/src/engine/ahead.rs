//! A look ahead: the entries of flows are fetched from memory while packets before them are worked off.
//!
//! With more flows than the caches hold, waiting for the entry is what a packet's decision costs most. Memory answers several
//! questions at once if none has to wait for the one before, so that a group of frames is looked at in steps, and no step waits:
//!
//! ```text
//!  note: hash each frame, ask for its tags ──► fetch: lock, read tags, note where the entries may be ──► ask for all of these
//! ```

use phalanx_flow::key::{TCP, UDP, mapped};
use phalanx_flow::{FlowKey, FlowSeed, flow_hash};

use super::Engine;
use super::table::Whereabouts;

/// Frames of a group: enough questions to keep memory busy, few enough entries to stay in the caches until they are used.
pub const GROUP: usize = 16;

/// The frames that are ruled on soon. A hint: nothing changes but the time that ruling takes.
#[derive(Debug)]
pub struct Ahead<'e> {
    engine: &'e Engine,
    seed: FlowSeed,
    hashes: [u64; GROUP],
    noted: usize,
    found: Whereabouts,
}

impl<'e> Ahead<'e> {
    /// Looks ahead for `engine`, whose flows hash by `seed`.
    pub fn new(engine: &'e Engine, seed: FlowSeed) -> Self {
        Self { engine, seed, hashes: [0; GROUP], noted: 0, found: Whereabouts::default() }
    }

    /// Notes a whole Ethernet frame; those beyond a group are left out.
    #[inline]
    pub fn note(&mut self, frame: &[u8]) {
        if let Some(place) = self.hashes.get_mut(self.noted)
            && let Some(key) = probable_key(frame)
        {
            *place = flow_hash(self.seed, &key);
            self.engine.table.prefetch_tags(*place);
            self.noted += 1;
        }
    }

    /// Asks for the entries of all that was noted since the last time.
    #[inline]
    pub fn fetch(&mut self) {
        self.engine.table.prefetch_entries(&self.hashes[..self.noted], &mut self.found);
        self.noted = 0;
    }
}

/// The flow of a frame of the most frequent form: untagged, no IPv4 options or IPv6 extension headers. May be wrong for others.
#[inline]
fn probable_key(frame: &[u8]) -> Option<FlowKey> {
    let ip = frame.get(14..)?;
    let (protocol, family, source, destination, ports) = match (frame.get(12..14)?, ip.first()?) {
        ([0x08, 0x00], 0x45) => {
            let header = ip.first_chunk::<24>()?;
            let [s0, s1, s2, s3, d0, d1, d2, d3] = *header[12..].first_chunk()?;
            let ports: [u8; 4] = *header[20..].first_chunk()?;
            (header[9], 4, mapped([s0, s1, s2, s3]), mapped([d0, d1, d2, d3]), ports)
        }
        ([0x86, 0xdd], _) => {
            let header = ip.first_chunk::<44>()?;
            let (source, destination) = (*header[8..].first_chunk()?, *header[24..].first_chunk()?);
            (header[6], 6, source, destination, *header[40..].first_chunk()?)
        }
        _ => return None,
    };
    let [s0, s1, d0, d1] = ports;
    matches!(protocol, TCP | UDP).then_some(FlowKey {
        source,
        destination,
        source_port: [s0, s1],
        destination_port: [d0, d1],
        protocol,
        family,
        reserved: [0; 2],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(ethertype: [u8; 2], ip: &[u8]) -> Vec<u8> {
        [&[2; 12], &ethertype[..], ip].concat()
    }

    fn v4(first: u8, protocol: u8) -> Vec<u8> {
        let mut ip = vec![0; 28];
        (ip[0], ip[9]) = (first, protocol);
        ip[12..20].copy_from_slice(&[198, 18, 0, 1, 192, 0, 2, 1]);
        ip[20..24].copy_from_slice(&[0x12, 0x34, 0, 80]);
        frame([8, 0], &ip)
    }

    #[test]
    fn the_key_is_the_flows() {
        let expected = |source: &str, destination: &str| {
            FlowKey::new(
                TCP,
                (source.parse().expect("an address"), 0x1234),
                (destination.parse().expect("an address"), 80),
            )
        };
        assert_eq!(probable_key(&v4(0x45, TCP)), expected("198.18.0.1", "192.0.2.1"));
        let mut ip = vec![0; 44];
        (ip[0], ip[6], ip[8], ip[23], ip[24], ip[39]) = (0x60, TCP, 0xfd, 1, 0xfd, 2);
        ip[40..44].copy_from_slice(&[0x12, 0x34, 0, 80]);
        assert_eq!(probable_key(&frame([0x86, 0xdd], &ip)), expected("fd00::1", "fd00::2"));
    }

    #[test]
    fn other_frames_and_cut_ones_have_none() {
        for other in [v4(0x46, TCP), v4(0x45, 1), frame([0x81, 0], &v4(0x45, TCP)[14..])] {
            assert_eq!(probable_key(&other), None);
        }
        let whole = v4(0x45, UDP);
        assert!(probable_key(&whole[..38]).is_some());
        for length in 0..38 {
            assert_eq!(probable_key(&whole[..length]), None);
        }
    }
}
