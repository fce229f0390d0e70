//! tc: a classic-BPF filter before everything the kernel does with a received frame.

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Nla};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcBpfFlags, TcFilterBpfOption, TcHandle, TcMessage, TcOption};

use crate::{Netlink, Result};

/// `TCA_BPF_OPS_LEN` and `TCA_BPF_OPS`, include/uapi/linux/pkt_cls.h; the packet library knows only eBPF's attributes.
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;
/// `ETH_P_ALL`.
const ETH_P_ALL: u16 = 3;
/// `BPF_MAXINSNS`: the kernel takes no longer classic program.
const MAX_INSTRUCTIONS: usize = 4096;

/// One instruction of classic BPF: `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BpfInstruction {
    /// What to do.
    pub code: u16,
    /// How many instructions to skip if a comparison is true.
    pub jt: u8,
    /// The same if it is false.
    pub jf: u8,
    /// The operand.
    pub k: u32,
}

/// A filter to attach to a link's ingress.
///
/// In direct-action mode the program's return value is the verdict: `TC_ACT_UNSPEC` (-1 as `u32::MAX`) lets the packet pass to the next
/// filter, `TC_ACT_SHOT` (2) drops it, `TC_ACT_OK` (0) passes it to the stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BpfFilter {
    /// The interface, which must have a clsact qdisc.
    pub index: u32,
    /// Lower numbers come first; 1 to 65,535.
    pub priority: u16,
    /// Tells filters of one priority apart, and whose it is (the kernel keeps no name of a classic program); above 0.
    pub handle: u32,
    /// At most 4,096 instructions.
    pub program: Vec<BpfInstruction>,
}

/// A filter found on a link's ingress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// As [`BpfFilter::priority`].
    pub priority: u16,
    /// As [`BpfFilter::handle`]; 0 in the line that stands for the whole priority.
    pub handle: u32,
    /// "bpf", "flower", and so on.
    pub kind: String,
    /// The classic program; `None` for an eBPF one and for other kinds.
    pub program: Option<Vec<BpfInstruction>>,
}

impl Netlink {
    /// Gives a link the clsact qdisc that filters hang on; one that is there is left alone.
    pub fn ensure_clsact(&mut self, index: u32) -> Result<()> {
        match self.request(
            &|| format!("add the clsact qdisc to link {index}"),
            RouteNetlinkMessage::NewQueueDiscipline(clsact_message(index)),
            NLM_F_CREATE | NLM_F_EXCL,
        ) {
            Err(error) if !error.is_exists() => Err(error),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Takes the clsact qdisc from a link, with every filter on it, also others' filters.
    pub fn delete_clsact(&mut self, index: u32) -> Result<()> {
        self.request(
            &|| format!("delete the clsact qdisc of link {index}"),
            RouteNetlinkMessage::DelQueueDiscipline(clsact_message(index)),
            0,
        )
        .map(drop)
    }

    /// Adds a filter to a link's ingress; fails if its priority and handle are taken.
    pub fn add_bpf_filter(&mut self, filter: &BpfFilter) -> Result<()> {
        self.change_filter(filter, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Adds a filter to a link's ingress, or puts it in the place of the one with the same priority and handle, without a gap.
    pub fn replace_bpf_filter(&mut self, filter: &BpfFilter) -> Result<()> {
        self.change_filter(filter, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// As [`Netlink::replace_bpf_filter`], for what a link sends.
    pub fn replace_bpf_filter_on_egress(&mut self, filter: &BpfFilter) -> Result<()> {
        self.set_filter(filter, egress(), NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn change_filter(&mut self, filter: &BpfFilter, flags: u16) -> Result<()> {
        self.set_filter(filter, ingress(), flags)
    }

    fn set_filter(&mut self, filter: &BpfFilter, parent: TcHandle, flags: u16) -> Result<()> {
        self.request(
            &|| format!("set filter {}:{} on link {}", filter.priority, filter.handle, filter.index),
            RouteNetlinkMessage::NewTrafficFilter(filter_message(filter, parent)),
            flags,
        )
        .map(drop)
    }

    /// The filters on a link's ingress, first to last.
    pub fn filters(&mut self, index: u32) -> Result<Vec<Filter>> {
        let mut message = TcMessage::with_index(index.cast_signed());
        message.header.parent = ingress();
        let answers = self.dump(
            &|| format!("list the filters of link {index}"),
            RouteNetlinkMessage::GetTrafficFilter(message),
        )?;
        Ok(answers.into_iter().filter_map(filter_of).collect())
    }

    /// Deletes the BPF filter with this priority and handle from a link's ingress.
    pub fn delete_bpf_filter(&mut self, index: u32, priority: u16, handle: u32) -> Result<()> {
        self.remove_filter(index, ingress(), priority, handle)
    }

    /// As [`Netlink::delete_bpf_filter`], for what a link sends.
    pub fn delete_bpf_filter_on_egress(&mut self, index: u32, priority: u16, handle: u32) -> Result<()> {
        self.remove_filter(index, egress(), priority, handle)
    }

    fn remove_filter(&mut self, index: u32, parent: TcHandle, priority: u16, handle: u32) -> Result<()> {
        let mut message = TcMessage::with_index(index.cast_signed());
        message.header.parent = parent;
        message.header.handle = TcHandle::from(handle);
        message.header.info = info(priority);
        message.attributes.push(TcAttribute::Kind("bpf".to_owned()));
        self.request(
            &|| format!("delete filter {priority}:{handle} from link {index}"),
            RouteNetlinkMessage::DelTrafficFilter(message),
            0,
        )
        .map(drop)
    }
}

const fn ingress() -> TcHandle {
    TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS }
}

const fn egress() -> TcHandle {
    TcHandle { major: u16::MAX, minor: TcHandle::MIN_EGRESS }
}

/// `tcm_info`: priority in the upper half, protocol in network byte order in the lower.
const fn info(priority: u16) -> u32 {
    (priority as u32) << 16 | ETH_P_ALL.to_be() as u32
}

fn clsact_message(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    message.header.parent = TcHandle::CLSACT;
    message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    message
}

fn filter_message(filter: &BpfFilter, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::with_index(filter.index.cast_signed());
    message.header.parent = parent;
    message.header.handle = TcHandle::from(filter.handle);
    message.header.info = info(filter.priority);
    let count = u16::try_from(filter.program.len().min(MAX_INSTRUCTIONS + 1)).unwrap_or(u16::MAX);
    let bytes: Vec<u8> = filter.program.iter().flat_map(|instruction| to_bytes(*instruction)).collect();
    let classic = |kind, value| TcOption::Bpf(TcFilterBpfOption::Other(DefaultNla::new(kind, value)));
    message.attributes.push(TcAttribute::Kind("bpf".to_owned()));
    message.attributes.push(TcAttribute::Options(vec![
        classic(TCA_BPF_OPS_LEN, count.to_ne_bytes().to_vec()),
        classic(TCA_BPF_OPS, bytes),
        TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ]));
    message
}

fn to_bytes(instruction: BpfInstruction) -> [u8; 8] {
    let [a, b] = instruction.code.to_ne_bytes();
    let [w, x, y, z] = instruction.k.to_ne_bytes();
    [a, b, instruction.jt, instruction.jf, w, x, y, z]
}

const fn from_bytes(bytes: &[u8; 8]) -> BpfInstruction {
    let [a, b, jt, jf, w, x, y, z] = *bytes;
    BpfInstruction { code: u16::from_ne_bytes([a, b]), jt, jf, k: u32::from_ne_bytes([w, x, y, z]) }
}

fn filter_of(message: RouteNetlinkMessage) -> Option<Filter> {
    let RouteNetlinkMessage::NewTrafficFilter(message) = message else { return None };
    let mut filter = Filter {
        // The priority is the upper half of tcm_info.
        priority: (message.header.info >> 16) as u16,
        handle: message.header.handle.into(),
        kind: String::new(),
        program: None,
    };
    for attribute in message.attributes {
        match attribute {
            TcAttribute::Kind(kind) => filter.kind = kind,
            TcAttribute::Options(options) => {
                for option in options {
                    match option {
                        TcOption::Bpf(TcFilterBpfOption::Other(nla)) if nla.kind() == TCA_BPF_OPS => {
                            filter.program = Some(program_of(&nla));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(filter)
}

fn program_of(nla: &DefaultNla) -> Vec<BpfInstruction> {
    let mut bytes = vec![0; nla.value_len()];
    nla.emit_value(&mut bytes);
    bytes.as_chunks().0.iter().map(from_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> BpfFilter {
        BpfFilter {
            index: 3,
            priority: 7,
            handle: 1,
            program: vec![
                BpfInstruction { code: 0x28, jt: 0, jf: 0, k: 12 },
                BpfInstruction { code: 0x15, jt: 0, jf: 1, k: 0x0800 },
                BpfInstruction { code: 0x06, jt: 0, jf: 0, k: 2 },
                BpfInstruction { code: 0x06, jt: 0, jf: 0, k: u32::MAX },
            ],
        }
    }

    #[test]
    fn a_filter_survives_the_way_through_a_message() {
        let filter = example();
        let found =
            filter_of(RouteNetlinkMessage::NewTrafficFilter(filter_message(&filter, ingress()))).unwrap();
        assert_eq!(
            found,
            Filter { priority: 7, handle: 1, kind: "bpf".to_owned(), program: Some(filter.program.clone()) }
        );
        // Twin: another program is seen to be another.
        let mut other = filter.clone();
        other.program[2].k = 0;
        let found =
            filter_of(RouteNetlinkMessage::NewTrafficFilter(filter_message(&other, ingress()))).unwrap();
        assert_ne!(found.program, Some(filter.program));
    }

    #[test]
    fn the_wire_form_is_that_of_the_kernel_headers() {
        let bytes = crate::socket::serialize(
            RouteNetlinkMessage::NewTrafficFilter(filter_message(&example(), ingress())),
            0,
            1,
        );
        // struct nlmsghdr (16), struct tcmsg: family, pads, ifindex, handle, parent, info.
        assert_eq!(bytes[20..24], 3u32.to_ne_bytes());
        assert_eq!(bytes[24..28], 1u32.to_ne_bytes());
        assert_eq!(bytes[28..32], 0xffff_fff2u32.to_ne_bytes());
        assert_eq!(bytes[32..36], (7u32 << 16 | 0x0300).to_ne_bytes());
        // TCA_BPF_OPS_LEN is a u16 of its own: length 6, type 4, 4 instructions.
        let wanted = [6u8, 0, 4, 0, 4, 0];
        assert!(bytes.windows(6).any(|window| window == wanted));
    }
}
