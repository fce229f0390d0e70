//! Frames from one line of text, so that a table of cases can be read.
//!
//! ```text
//! [vlan=ID] [svlan=ID] ip4 SRC>DST [ttl=N] [tos=N] [id=N] [df] [opt=HEX] [at=BYTES] [more] TRANSPORT
//! [vlan=ID]            ip6 SRC>DST [ttl=N] [hbh] [route] [dst] [id=N at=BYTES more] TRANSPORT
//! TRANSPORT: tcp SPORT>DPORT FLAGS [len=N]     FLAGS out of SAFRPUEC
//!            udp SPORT>DPORT [len=N]
//!            icmp TYPE CODE [rest=N] [len=N] [quote=BYTES] [{ip packet that is quoted}]
//!            proto=N [len=N]
//!            payload [len=N] [of=PROTOCOL]     what a later fragment has; of UDP unless it says otherwise
//!            handoff PORT [hops=N] [cookie=N] [bypassed=ID | knows=ID] [ports=S,D] [echo=TOKEN | reply=TOKEN] [{ip packet}]
//! at the end: [cut=BYTES] [pad=BYTES] [poke=OFFSET:HEX] of the whole frame
//! ```

use std::net::IpAddr;

use phalanx_flow::checksum;
use phalanx_flow::encap::{HandOffFlags, HandOffHeader, hand_off_bytes};
use phalanx_flow::key::{ICMP, ICMPV6, TCP, UDP, octets};
use phalanx_flow::{MemberId, offload};

/// Our interface's MAC address.
pub const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The router's, through which everything comes and goes.
pub const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The view digest in hand-offs that are built here.
pub const VIEW_DIGEST: u64 = 0x1122_3344_5566_7788;
/// The cookie in hand-offs that are built here, unless they say otherwise.
pub const COOKIE: u64 = 0x0c00_71e5;

/// Builds an Ethernet frame from its line.
///
/// # Panics
/// If the line is wrong: it is part of a test.
pub fn frame(line: &str) -> Vec<u8> {
    let mut words = Words::new(line);
    let mut bytes = [OUR_MAC, ROUTER_MAC].concat();
    while let Some((name, id)) = words.option(&["vlan", "svlan"]) {
        let ethertype: u16 = if name == "vlan" { 0x8100 } else { 0x88a8 };
        bytes.extend(ethertype.to_be_bytes());
        bytes.extend((number(id) as u16).to_be_bytes());
    }
    let start = bytes.len() + 2;
    let packet = ip(&mut words);
    bytes.extend(if packet[0] >> 4 == 4 { [0x08, 0x00] } else { [0x86, 0xdd] });
    bytes.extend(&packet);
    debug_assert_eq!(bytes.len(), start + packet.len());
    while let Some((name, value)) = words.option(&["cut", "pad", "poke"]) {
        match name {
            "cut" => bytes.truncate(number(value) as usize),
            "pad" => bytes.resize(bytes.len() + number(value) as usize, 0),
            _ => {
                let (offset, patch) = value.split_once(':').expect("OFFSET:HEX");
                let (offset, patch) = (number(offset) as usize, unhex(patch));
                bytes[offset..offset + patch.len()].copy_from_slice(&patch);
            }
        }
    }
    words.done();
    bytes
}

/// Builds an IP packet from its line.
///
/// # Panics
/// If the line is wrong.
pub fn ip_packet(line: &str) -> Vec<u8> {
    let mut words = Words::new(line);
    let packet = ip(&mut words);
    words.done();
    packet
}

/// Bytes as text.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Text as bytes.
///
/// # Panics
/// If it is not hexadecimal.
pub fn unhex(text: &str) -> Vec<u8> {
    let digit = |c: u8| (c as char).to_digit(16).expect("a hexadecimal digit") as u8;
    text.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

fn ip(words: &mut Words<'_>) -> Vec<u8> {
    match words.next() {
        "ip4" => ip4(words),
        "ip6" => ip6(words),
        other => panic!("ip4 or ip6, not {other:?}"),
    }
}

fn addresses(words: &mut Words<'_>) -> (IpAddr, IpAddr) {
    let (source, destination) = words.next().split_once('>').expect("SRC>DST");
    (source.parse().expect("an address"), destination.parse().expect("an address"))
}

#[derive(Default)]
struct Fragmenting {
    id: u32,
    at: u16,
    more: bool,
    wanted: bool,
}

fn ip4(words: &mut Words<'_>) -> Vec<u8> {
    let (source, destination) = addresses(words);
    let (mut ttl, mut tos, mut dont, mut options) = (64, 0, false, Vec::new());
    let mut fragment = Fragmenting::default();
    loop {
        if words.flag("df") {
            dont = true;
        } else if words.flag("more") {
            fragment.more = true;
        } else if let Some((name, value)) = words.option(&["ttl", "tos", "id", "opt", "at"]) {
            match name {
                "ttl" => ttl = number(value) as u8,
                "tos" => tos = number(value) as u8,
                "id" => fragment.id = number(value) as u32,
                "at" => fragment.at = number(value) as u16,
                _ => options = unhex(value),
            }
        } else {
            break;
        }
    }
    let (protocol, body) = transport(words, source, destination);
    let header = 20 + options.len();
    let field = u16::from(dont) << 14 | u16::from(fragment.more) << 13 | (fragment.at / 8);
    let mut packet = vec![0x40 | (header / 4) as u8, tos];
    packet.extend(((header + body.len()) as u16).to_be_bytes());
    packet.extend((fragment.id as u16).to_be_bytes());
    packet.extend(field.to_be_bytes());
    packet.extend([ttl, protocol, 0, 0]);
    for address in [source, destination] {
        packet.extend(phalanx_flow::key::unmapped(octets(address).0));
    }
    packet.extend(options);
    let sum = checksum::finish(checksum::of_slice(&packet));
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(body);
    packet
}

fn ip6(words: &mut Words<'_>) -> Vec<u8> {
    let (source, destination) = addresses(words);
    let mut ttl = 64;
    let mut extensions: Vec<u8> = Vec::new();
    let mut fragment = Fragmenting::default();
    loop {
        let kinds = [("hbh", 0), ("route", 43), ("dst", 60)];
        if words.flag("more") {
            fragment.more = true;
            fragment.wanted = true;
        } else if let Some((_, kind)) = kinds.iter().find(|(name, _)| words.flag(name)) {
            extensions.push(*kind);
        } else if let Some((name, value)) = words.option(&["ttl", "id", "at"]) {
            match name {
                "ttl" => ttl = number(value) as u8,
                "id" => (fragment.id, fragment.wanted) = (number(value) as u32, true),
                _ => fragment.at = number(value) as u16,
            }
        } else {
            break;
        }
    }
    if fragment.wanted {
        extensions.push(44);
    }
    let (protocol, body) = transport(words, source, destination);
    let mut rest = Vec::new();
    for (place, kind) in extensions.iter().enumerate() {
        let next = extensions.get(place + 1).copied().unwrap_or(protocol);
        if *kind == 44 {
            rest.extend([next, 0]);
            rest.extend((fragment.at | u16::from(fragment.more)).to_be_bytes());
            rest.extend(fragment.id.to_be_bytes());
        } else {
            // PadN of four bytes; for routing: type 0, no segments left.
            rest.extend([
                next,
                0,
                if *kind == 43 { 0 } else { 1 },
                if *kind == 43 { 0 } else { 4 },
                0,
                0,
                0,
                0,
            ]);
        }
    }
    rest.extend(body);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((rest.len() as u16).to_be_bytes());
    packet.extend([extensions.first().copied().unwrap_or(protocol), ttl]);
    packet.extend(octets(source).0);
    packet.extend(octets(destination).0);
    packet.extend(rest);
    packet
}

fn transport(words: &mut Words<'_>, source: IpAddr, destination: IpAddr) -> (u8, Vec<u8>) {
    let v4 = source.is_ipv4();
    let word = words.next();
    let (protocol, mut body, sum_at) = match word {
        "tcp" => {
            let mut body = ports(words);
            let flags = words.next().chars().fold(0, |flags, c| flags | tcp_flag(c));
            body.extend([0x11; 4]);
            body.extend(if flags & 0x10 != 0 { [0x22; 4] } else { [0; 4] });
            body.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
            body.extend(filler(words));
            (TCP, body, Some(16))
        }
        "udp" => {
            let mut body = ports(words);
            let data = filler(words);
            body.extend(((8 + data.len()) as u16).to_be_bytes());
            body.extend([0, 0]);
            body.extend(data);
            (UDP, body, Some(6))
        }
        "icmp" => {
            let (kind, code) = (number(words.next()) as u8, number(words.next()) as u8);
            let rest = words.option(&["rest"]).map_or(0, |(_, value)| number(value) as u32);
            let mut body = vec![kind, code, 0, 0];
            body.extend(rest.to_be_bytes());
            body.extend(filler(words));
            let quoted = words.option(&["quote"]).map_or(usize::MAX, |(_, value)| number(value) as usize);
            let mut inner = words.nested().map(|inner| ip_packet(&inner)).unwrap_or_default();
            inner.truncate(quoted);
            body.extend(inner);
            body.extend(filler(words));
            (if v4 { ICMP } else { ICMPV6 }, body, Some(2))
        }
        "payload" => (UDP, filler(words), None),
        "handoff" => (UDP, hand_off(words), None),
        _ => match word.split_once('=') {
            Some(("proto", value)) => (number(value) as u8, filler(words), None),
            _ => panic!("a transport, not {word:?}"),
        },
    };
    // A fragment's payload may be that of TCP: the line says so.
    let protocol = match words.option(&["of"]) {
        Some((_, value)) => number(value) as u8,
        None => protocol,
    };
    if let Some(at) = sum_at {
        let mut sum = checksum::of_slice(&body);
        if !(v4 && protocol == ICMP) {
            let family = if v4 { 4 } else { 6 };
            let length = body.len() as u32;
            sum +=
                checksum::pseudo_header(family, &octets(source).0, &octets(destination).0, protocol, length);
        }
        let sum = if protocol == UDP { checksum::finish_udp(sum) } else { checksum::finish(sum) };
        body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    (protocol, body)
}

fn ports(words: &mut Words<'_>) -> Vec<u8> {
    let (source, destination) = words.next().split_once('>').expect("SPORT>DPORT");
    [source, destination].iter().flat_map(|port| (number(port) as u16).to_be_bytes()).collect()
}

fn tcp_flag(c: char) -> u8 {
    1 << "FSRPAUEC".find(c).expect("a TCP flag out of FSRPAUEC")
}

/// `len=N` bytes that count up.
fn filler(words: &mut Words<'_>) -> Vec<u8> {
    let length = words.option(&["len"]).map_or(0, |(_, value)| number(value));
    (0..length).map(|n| n as u8).collect()
}

fn hand_off(words: &mut Words<'_>) -> Vec<u8> {
    let port = number(words.next()) as u16;
    let mut header = HandOffHeader::new(1, VIEW_DIGEST, COOKIE);
    let mut inner = Vec::new();
    let mut family = 0;
    while let Some((name, value)) =
        words.option(&["hops", "cookie", "bypassed", "knows", "ports", "echo", "reply"])
    {
        match name {
            "hops" => header.hops = number(value) as u8,
            "cookie" => header.cookie = number(value),
            "bypassed" => header = header.bypassing(MemberId(number(value) as u32)),
            "knows" => header = header.bypassing(MemberId(number(value) as u32)).with_known(true),
            "ports" => {
                let (source, destination) = value.split_once(',').expect("S,D");
                let port = |text| (number(text) as u16).to_be_bytes();
                header = header.with_ports(port(source), port(destination));
            }
            _ => {
                let flag = if name == "echo" { HandOffFlags::ECHO_REQUEST } else { HandOffFlags::ECHO_REPLY };
                header.flags = HandOffFlags(flag);
                inner = number(value).to_be_bytes().to_vec();
            }
        }
    }
    if let Some(line) = words.nested() {
        inner = ip_packet(&line);
        family = inner[0] >> 4;
    }
    let mut body = 0xc001_u16.to_be_bytes().to_vec();
    body.extend(port.to_be_bytes());
    let geneve = hand_off_bytes(&header, family);
    body.extend(((8 + geneve.len() + inner.len()) as u16).to_be_bytes());
    body.extend([0, 0]);
    body.extend(geneve);
    body.extend(inner);
    body
}

/// Decimal, or hexadecimal with `0x`.
fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .unwrap_or_else(|_| panic!("a number, not {text:?}"))
}

/// Makes one merged TCP frame of what would be several: the checksum is the pseudo-header's sum, as the kernel leaves it.
pub fn unfinished(mut frame: Vec<u8>) -> (Vec<u8>, (u16, u16)) {
    let packet =
        phalanx_flow::packet::parse(&frame[..], phalanx_flow::packet::Link::Ethernet).expect("a packet");
    let (key, at) = (packet.key, usize::from(packet.l4_offset));
    let field = if key.protocol == TCP { 16 } else { 6 };
    let sum = checksum::pseudo_header(
        key.family,
        &key.source,
        &key.destination,
        key.protocol,
        u32::from(packet.l4_length),
    );
    frame[at + field..at + field + 2].copy_from_slice(&checksum::fold(sum).to_be_bytes());
    (frame, (packet.l4_offset, field as u16))
}

/// Whether an IP packet's checksums are right.
pub fn has_right_checksums(packet: &[u8]) -> bool {
    let header = usize::from(packet[0] & 15) * 4;
    if packet[0] >> 4 == 4 && checksum::finish(checksum::of_slice(&packet[..header])) != 0 {
        return false;
    }
    let mut copy = packet.to_vec();
    offload::fill_checksum(&mut copy).is_err() || copy == packet
}

struct Words<'a> {
    rest: &'a str,
}

impl<'a> Words<'a> {
    fn new(line: &'a str) -> Self {
        Self { rest: line.trim() }
    }

    fn peek(&self) -> &'a str {
        self.rest.split(' ').next().unwrap_or("")
    }

    fn next(&mut self) -> &'a str {
        let word = self.peek();
        self.rest = self.rest[word.len()..].trim_start();
        word
    }

    fn flag(&mut self, name: &str) -> bool {
        let found = self.peek() == name;
        if found {
            self.next();
        }
        found
    }

    fn option(&mut self, names: &[&str]) -> Option<(&'a str, &'a str)> {
        let (name, value) = self.peek().split_once('=')?;
        if !names.contains(&name) {
            return None;
        }
        self.next();
        Some((name, value))
    }

    /// What is between this brace and the one that closes it.
    fn nested(&mut self) -> Option<String> {
        let inside = self.rest.strip_prefix('{')?;
        let mut depth = 1;
        let end = inside.find(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth == 0
        });
        let end = end.expect("a closing brace");
        self.rest = inside[end + 1..].trim_start();
        Some(inside[..end].trim().to_owned())
    }

    fn done(&self) {
        assert!(self.rest.is_empty(), "left over: {:?}", self.rest);
    }
}
