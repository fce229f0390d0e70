//! The classic BPF programs that say which frames are ours.
//!
//! One description makes two programs: the packet socket's, which takes what is ours, and the one on tc ingress, which drops exactly
//! that, so that every frame has one owner.

use std::net::IpAddr;

use phalanx_netlink::BpfInstruction;

/// Returned by a socket's program: the whole frame.
const TAKE: u32 = u32::MAX;
/// Returned by a socket's program: nothing.
const LEAVE: u32 = 0;
/// `TC_ACT_SHOT` and `TC_ACT_UNSPEC`, include/uapi/linux/pkt_cls.h.
const TC_DROP: u32 = 2;
const TC_NEXT: u32 = u32::MAX;

/// Classic BPF opcodes, include/uapi/linux/bpf_common.h.
const LD_H_ABS: u16 = 0x28;
const LD_B_ABS: u16 = 0x30;
const LD_W_ABS: u16 = 0x20;
const LD_H_IND: u16 = 0x48;
const LDX_MSH: u16 = 0xb1;
const JEQ: u16 = 0x15;
const JGE: u16 = 0x35;
const JGT: u16 = 0x25;
const JSET: u16 = 0x45;
const RET: u16 = 0x06;

/// `SKF_AD_OFF + SKF_AD_PKTTYPE`, include/uapi/linux/filter.h: whose frame it is, by its destination MAC address.
const PACKET_TYPE: u32 = (-0x1000_i32 + 4) as u32;
/// The interface's own (`PACKET_HOST`, include/uapi/linux/if_packet.h).
const TO_US: u32 = 0;

/// Where the IP header starts in an untagged frame; the kernel takes the outermost VLAN tag off before either program runs.
const ETHERNET: u32 = 14;
/// The same behind one tag more.
const TAGGED: u32 = 18;

const ETHERTYPE_IPV4: u32 = 0x0800;
const ETHERTYPE_IPV6: u32 = 0x86dd;
const ETHERTYPE_VLAN: u32 = 0x8100;
const ETHERTYPE_SERVICE_VLAN: u32 = 0x88a8;
const UDP: u32 = 17;
const ICMPV6: u32 = 58;
/// Neighbour discovery (RFC 4861): the link's own business, whatever the address.
const FIRST_DISCOVERY: u32 = 133;
const LAST_DISCOVERY: u32 = 137;

/// The kernel takes no longer program (`BPF_MAXINSNS`).
pub(crate) const MAX_INSTRUCTIONS: usize = 4096;

/// Which frames are ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Selection {
    /// Addresses of services, sorted, each once.
    pub(crate) services: Vec<IpAddr>,
    /// Where hand-offs go to: our address and port.
    pub(crate) hand_off: (IpAddr, u16),
}

impl Selection {
    pub(crate) fn new(services: impl IntoIterator<Item = IpAddr>, hand_off: (IpAddr, u16)) -> Self {
        let mut services: Vec<IpAddr> = services.into_iter().collect();
        services.sort();
        services.dedup();
        Self { services, hand_off }
    }

    /// What either selects.
    pub(crate) fn union(&self, other: &Self) -> Self {
        Self::new(self.services.iter().chain(&other.services).copied(), other.hand_off)
    }

    /// The packet socket's program.
    pub(crate) fn socket_program(&self) -> Vec<BpfInstruction> {
        self.program(TAKE, LEAVE)
    }

    /// The program for tc ingress.
    pub(crate) fn drop_program(&self) -> Vec<BpfInstruction> {
        self.program(TC_DROP, TC_NEXT)
    }

    fn program(&self, ours: u32, others: u32) -> Vec<BpfInstruction> {
        // A switch floods frames to a station it has lost, and virtual and promiscuous interfaces deliver them. Every member would
        // forward every other member's again.
        let mut program = vec![
            ins(LD_W_ABS, 0, 0, PACKET_TYPE),
            ins(JEQ, 1, 0, TO_US),
            ins(RET, 0, 0, others),
            ins(LD_H_ABS, 0, 0, 12),
        ];
        self.family(&mut program, ETHERNET, ours, others);
        // Behind one more tag there are services, but no hand-offs: members address each other untagged or by a VLAN interface.
        program.extend([
            ins(JEQ, 2, 0, ETHERTYPE_VLAN),
            ins(JEQ, 1, 0, ETHERTYPE_SERVICE_VLAN),
            ins(RET, 0, 0, others),
            ins(LD_H_ABS, 0, 0, 16),
        ]);
        self.family(&mut program, TAGGED, ours, others);
        program.push(ins(RET, 0, 0, others));
        program
    }

    /// With the ethertype loaded: decides if it is IPv4 or IPv6, else goes on with the ethertype still loaded.
    fn family(&self, program: &mut Vec<BpfInstruction>, l3: u32, ours: u32, others: u32) {
        for (ethertype, body) in
            [(ETHERTYPE_IPV4, self.ipv4(l3, ours, others)), (ETHERTYPE_IPV6, self.ipv6(l3, ours, others))]
        {
            // Conditional jumps reach 255 instructions; an unconditional one reaches all.
            program.push(ins(JEQ, 1, 0, ethertype));
            program.push(ins(0x05, 0, 0, body.len() as u32));
            program.extend(body);
        }
    }

    fn ipv4(&self, l3: u32, ours: u32, others: u32) -> Vec<BpfInstruction> {
        let mut body = vec![ins(LD_W_ABS, 0, 0, l3 + 16)];
        for address in &self.services {
            if let IpAddr::V4(address) = address {
                body.extend([ins(JEQ, 0, 1, u32::from(*address)), ins(RET, 0, 0, ours)]);
            }
        }
        if let (IpAddr::V4(address), port) = self.hand_off
            && l3 == ETHERNET
        {
            body.extend([
                ins(JEQ, 0, 7, u32::from(address)),
                ins(LD_B_ABS, 0, 0, l3 + 9),
                ins(JEQ, 0, 5, UDP),
                ins(LD_H_ABS, 0, 0, l3 + 6),
                // Whole packets only: the kernel reassembles the others for the hand-off port's socket.
                ins(JSET, 3, 0, 0x3fff),
                ins(LDX_MSH, 0, 0, l3),
                ins(LD_H_IND, 0, 0, l3 + 2),
                ins(JEQ, 1, 0, u32::from(port)),
                ins(RET, 0, 0, others),
                ins(RET, 0, 0, ours),
            ]);
        } else {
            body.push(ins(RET, 0, 0, others));
        }
        body
    }

    fn ipv6(&self, l3: u32, ours: u32, others: u32) -> Vec<BpfInstruction> {
        let mut body = vec![
            ins(LD_B_ABS, 0, 0, l3 + 6),
            ins(JEQ, 0, 4, ICMPV6),
            ins(LD_B_ABS, 0, 0, l3 + 40),
            ins(JGE, 0, 2, FIRST_DISCOVERY),
            ins(JGT, 1, 0, LAST_DISCOVERY),
            ins(RET, 0, 0, others),
        ];
        let equal = |body: &mut Vec<BpfInstruction>, address: std::net::Ipv6Addr, after: u8| {
            for (word, bytes) in (0_u32..).zip(address.octets().as_chunks::<4>().0) {
                // From this comparison to the first instruction after the body of `after` instructions.
                let miss = after + 2 * (3 - word as u8);
                body.push(ins(LD_W_ABS, 0, 0, l3 + 24 + 4 * word));
                body.push(ins(JEQ, 0, miss, u32::from_be_bytes(*bytes)));
            }
        };
        for address in &self.services {
            if let IpAddr::V6(address) = address {
                equal(&mut body, *address, 1);
                body.push(ins(RET, 0, 0, ours));
            }
        }
        if let (IpAddr::V6(address), port) = self.hand_off
            && l3 == ETHERNET
        {
            equal(&mut body, address, 5);
            body.extend([
                ins(LD_B_ABS, 0, 0, l3 + 6),
                ins(JEQ, 0, 3, UDP),
                ins(LD_H_ABS, 0, 0, l3 + 42),
                ins(JEQ, 0, 1, u32::from(port)),
                ins(RET, 0, 0, ours),
            ]);
        }
        body.push(ins(RET, 0, 0, others));
        body
    }
}

const fn ins(code: u16, jt: u8, jf: u8, k: u32) -> BpfInstruction {
    BpfInstruction { code, jt, jf, k }
}

#[cfg(test)]
mod tests;
