//! What goes wrong on the links: packets are lost, a member is cut off, or members do not reach each other.
//!
//! It happens on the router's ends of the members' links, in tc's clsact hooks and by classic BPF, both ways: there every packet passes
//! as a frame, in both topologies and with both forwarders (what a member's XDP program redirects never sees that host's packet filter,
//! and what raw sockets receive is taken before it). It needs no program and no kernel module beside what members need anyway.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use phalanx_netlink::{BpfFilter, BpfInstruction, Netlink};

/// One kind of weather. Kinds do not disturb each other; two of one kind on one link do not add up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weather {
    /// So many of a hundred packets are lost.
    Loss(u32),
    /// All are.
    Cut,
    /// All between the link's host and these are.
    Split(Vec<Ipv4Addr>),
}

/// `TC_ACT_SHOT`, and `TC_ACT_UNSPEC` as a classic program returns it.
const DROP: u32 = 2;
const PASS: u32 = u32::MAX;
/// Our filters' handle; the priority says which kind.
const HANDLE: u32 = 1;

/// Classic BPF, include/uapi/linux/bpf_common.h.
const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;
/// `SKF_AD_OFF + SKF_AD_RANDOM` (include/uapi/linux/filter.h): 32 random bits.
const RANDOM: u32 = (-0x1000_i32 + 56) as u32;
/// Where EtherType, IPv4 source and IPv4 destination are in a frame without tags.
const ETHER_TYPE: u32 = 12;
const IPV4_SOURCE: u32 = 26;
const IPV4_DESTINATION: u32 = 30;

const fn op(code: u16, jt: u8, jf: u8, k: u32) -> BpfInstruction {
    BpfInstruction { code, jt, jf, k }
}

impl Weather {
    const fn priority(&self) -> u16 {
        match self {
            Self::Loss(_) => 1,
            Self::Cut => 2,
            Self::Split(_) => 3,
        }
    }

    /// Begins on a link, named by the router's interface.
    pub fn begin(&self, netlink: &mut Netlink, index: u32) -> Result<()> {
        netlink.ensure_clsact(index)?;
        let filter = |program| BpfFilter { index, priority: self.priority(), handle: HANDLE, program };
        // What the router receives comes from the member, and what it sends goes there.
        netlink.replace_bpf_filter(&filter(self.program(IPV4_DESTINATION)))?;
        Ok(netlink.replace_bpf_filter_on_egress(&filter(self.program(IPV4_SOURCE)))?)
    }

    /// Ends on a link.
    pub fn end(&self, netlink: &mut Netlink, index: u32) -> Result<()> {
        netlink.delete_bpf_filter(index, self.priority(), HANDLE)?;
        Ok(netlink.delete_bpf_filter_on_egress(index, self.priority(), HANDLE)?)
    }

    /// The program of one direction; `other` is where the other host's address stands.
    fn program(&self, other: u32) -> Vec<BpfInstruction> {
        match self {
            Self::Loss(percent) => {
                let limit = (u64::from(u32::MAX) * u64::from(*percent) / 100) as u32;
                vec![
                    op(LOAD_WORD, 0, 0, RANDOM),
                    op(JUMP_GREATER_OR_EQUAL, 0, 1, limit),
                    op(RETURN, 0, 0, PASS),
                    op(RETURN, 0, 0, DROP),
                ]
            }
            Self::Cut => vec![op(RETURN, 0, 0, DROP)],
            Self::Split(others) => {
                let mut program = vec![
                    op(LOAD_HALF, 0, 0, ETHER_TYPE),
                    op(JUMP_EQUAL, 1, 0, 0x0800),
                    op(RETURN, 0, 0, PASS),
                    op(LOAD_WORD, 0, 0, other),
                ];
                for address in others {
                    program.push(op(JUMP_EQUAL, 0, 1, address.to_bits()));
                    program.push(op(RETURN, 0, 0, DROP));
                }
                program.push(op(RETURN, 0, 0, PASS));
                program
            }
        }
    }
}

/// The IPv4 addresses among these.
pub fn v4_addresses(addresses: impl Iterator<Item = IpAddr>) -> Vec<Ipv4Addr> {
    addresses
        .filter_map(|address| match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program on a frame, with this for its random number.
    fn verdict(weather: &Weather, other: u32, frame: &[u8], random: u32) -> u32 {
        let program = weather.program(other);
        let (mut at, mut accumulator) = (0, 0u32);
        loop {
            let BpfInstruction { code, jt, jf, k } = program[at];
            at += 1;
            let jump = |taken: bool| usize::from(if taken { jt } else { jf });
            match code {
                LOAD_WORD if k == RANDOM => accumulator = random,
                LOAD_WORD => {
                    let bytes = &frame[k as usize..][..4];
                    accumulator = u32::from_be_bytes(bytes.try_into().unwrap());
                }
                LOAD_HALF => {
                    let bytes = &frame[k as usize..][..2];
                    accumulator = u16::from_be_bytes(bytes.try_into().unwrap()).into();
                }
                JUMP_EQUAL => at += jump(accumulator == k),
                JUMP_GREATER_OR_EQUAL => at += jump(accumulator >= k),
                RETURN => return k,
                other => panic!("no such instruction here: {other:#x}"),
            }
        }
    }

    fn frame(ether_type: u16, source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[12..14].copy_from_slice(&ether_type.to_be_bytes());
        frame[26..30].copy_from_slice(&source.octets());
        frame[30..34].copy_from_slice(&destination.octets());
        frame
    }

    #[test]
    fn as_many_packets_are_lost_as_asked_for() {
        let frame = frame(0x0800, Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST);
        let lost = (0..1000u32)
            .filter(|step| verdict(&Weather::Loss(5), IPV4_SOURCE, &frame, step * (u32::MAX / 1000)) == DROP)
            .count();
        assert!((49..=51).contains(&lost), "{lost}");
        assert_eq!(verdict(&Weather::Loss(100), IPV4_SOURCE, &frame, u32::MAX - 1), DROP);
        assert_eq!(verdict(&Weather::Cut, IPV4_SOURCE, &frame, 0), DROP);
    }

    #[test]
    fn a_split_parts_members_and_leaves_everybody_else_alone() {
        let [a, b, c, client] = [1, 2, 3, 9].map(|last| Ipv4Addr::new(10, 0, 1, last));
        let split = Weather::Split(vec![b, c]);
        // From the member: its destination counts. To the member: its source.
        for (other, from, to, expected) in [
            (IPV4_DESTINATION, a, b, DROP),
            (IPV4_DESTINATION, a, c, DROP),
            (IPV4_DESTINATION, a, client, PASS),
            (IPV4_SOURCE, c, a, DROP),
            (IPV4_SOURCE, client, a, PASS),
        ] {
            assert_eq!(verdict(&split, other, &frame(0x0800, from, to), 0), expected, "{from} to {to}");
        }
        assert_eq!(verdict(&split, IPV4_SOURCE, &frame(0x0806, b, a), 0), PASS, "ARP");
        assert_eq!(v4_addresses([IpAddr::V4(a), "fd00::1".parse().unwrap()].into_iter()), [a]);
    }
}
