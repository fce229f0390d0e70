use super::*;

/// Runs a program on a frame to the interface's own address.
fn run(program: &[BpfInstruction], frame: &[u8]) -> u32 {
    run_on(program, frame, TO_US)
}

/// Runs a program as the kernel does (net/core/filter.c); a load beyond the frame returns 0.
fn run_on(program: &[BpfInstruction], frame: &[u8], packet_type: u32) -> u32 {
    let (mut a, mut x, mut at) = (0_u32, 0_u32, 0_usize);
    let load = |offset: usize, length: usize| {
        let bytes = frame.get(offset..offset + length)?;
        Some(bytes.iter().fold(0_u32, |value, byte| value << 8 | u32::from(*byte)))
    };
    loop {
        let BpfInstruction { code, jt, jf, k } = program[at];
        at += 1;
        let mut jump = |taken: bool| at += usize::from(if taken { jt } else { jf });
        let loaded = match code {
            LD_W_ABS if k == PACKET_TYPE => Some(Some(packet_type)),
            LD_W_ABS => Some(load(k as usize, 4)),
            LD_H_ABS => Some(load(k as usize, 2)),
            LD_B_ABS => Some(load(k as usize, 1)),
            LD_H_IND => Some(load((x + k) as usize, 2)),
            _ => None,
        };
        match (code, loaded) {
            (_, Some(None)) => return 0,
            (_, Some(Some(value))) => a = value,
            (LDX_MSH, _) => match load(k as usize, 1) {
                Some(value) => x = (value & 0xf) * 4,
                None => return 0,
            },
            (JEQ, _) => jump(a == k),
            (JGE, _) => jump(a >= k),
            (JGT, _) => jump(a > k),
            (JSET, _) => jump(a & k != 0),
            (0x05, _) => at += k as usize,
            (RET, _) => return k,
            (other, _) => panic!("opcode {other:#x}"),
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn selection() -> Selection {
    Selection::new(["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"].map(ip), (ip("10.0.0.1"), 6081))
}

fn v4(destination: &str, protocol: u8, port: u16) -> Vec<u8> {
    let IpAddr::V4(destination) = ip(destination) else { unreachable!() };
    let mut frame = vec![0; 12];
    frame.extend([0x08, 0x00, 0x45, 0, 0, 40, 0, 1, 0, 0, 64, protocol, 0, 0, 10, 9, 9, 9]);
    frame.extend(destination.octets());
    frame.extend([0x12, 0x34]);
    frame.extend(port.to_be_bytes());
    frame.extend([0; 16]);
    frame
}

fn v6(destination: &str, protocol: u8, port: u16) -> Vec<u8> {
    let IpAddr::V6(destination) = ip(destination) else { unreachable!() };
    let mut frame = vec![0; 12];
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, protocol, 64]);
    frame.extend([0x20; 16]);
    frame.extend(destination.octets());
    frame.extend([0x12, 0x34]);
    frame.extend(port.to_be_bytes());
    frame.extend([0; 16]);
    frame
}

fn tagged(mut frame: Vec<u8>, ethertype: u16) -> Vec<u8> {
    let [a, b] = ethertype.to_be_bytes();
    frame.splice(12..12, [a, b, 0, 5]);
    frame
}

#[track_caller]
fn check(selection: &Selection, frame: &[u8], ours: bool) {
    let (socket, drop) = (selection.socket_program(), selection.drop_program());
    assert_eq!(run(&socket, frame), if ours { TAKE } else { LEAVE });
    // What the socket leaves, tc never drops.
    assert_eq!(run(&drop, frame) == TC_DROP, ours);
}

#[test]
fn packets_to_services_are_taken_and_others_are_left() {
    let selection = selection();
    for service in ["192.0.2.1", "192.0.2.2"] {
        check(&selection, &v4(service, 6, 80), true);
        check(&selection, &v4(service, 1, 0), true);
        check(&selection, &tagged(v4(service, 17, 53), 0x8100), true);
        check(&selection, &tagged(v4(service, 17, 53), 0x88a8), true);
    }
    for service in ["2001:db8::1", "2001:db8::2"] {
        check(&selection, &v6(service, 6, 80), true);
        check(&selection, &tagged(v6(service, 6, 80), 0x8100), true);
    }
    check(&selection, &v4("192.0.2.3", 6, 80), false);
    check(&selection, &v4("10.0.0.1", 6, 80), false);
    check(&selection, &tagged(v4("192.0.2.3", 6, 80), 0x8100), false);
    for other in ["2001:db8::3", "2001:db8:1::1", "2001:db9::1", "3001:db8::2"] {
        check(&selection, &v6(other, 6, 80), false);
    }
    let mut arp = v4("192.0.2.1", 6, 80);
    arp[13] = 0x06;
    check(&selection, &arp, false);
}

#[test]
fn frames_to_other_stations_are_left() {
    /// `PACKET_BROADCAST`, `PACKET_MULTICAST` and `PACKET_OTHERHOST`, include/uapi/linux/if_packet.h.
    const NOT_TO_US: [u32; 3] = [1, 2, 3];
    let selection = selection();
    for frame in [v4("192.0.2.1", 6, 80), v6("2001:db8::1", 6, 80), v4("10.0.0.1", 17, 6081)] {
        check(&selection, &frame, true);
        for packet_type in NOT_TO_US {
            assert_eq!(run_on(&selection.socket_program(), &frame, packet_type), LEAVE);
            assert_eq!(run_on(&selection.drop_program(), &frame, packet_type), TC_NEXT);
        }
    }
}

#[test]
fn neighbour_discovery_for_a_service_is_left_to_the_kernel() {
    let selection = selection();
    for kind in [133, 135, 137] {
        let mut frame = v6("2001:db8::1", 58, 0);
        frame[14 + 40] = kind;
        check(&selection, &frame, false);
    }
    for kind in [1, 2, 128, 132, 138] {
        let mut frame = v6("2001:db8::1", 58, 0);
        frame[14 + 40] = kind;
        check(&selection, &frame, true);
    }
}

#[test]
fn whole_hand_offs_are_taken_and_fragmented_ones_are_left() {
    let selection = selection();
    check(&selection, &v4("10.0.0.1", 17, 6081), true);
    check(&selection, &v4("10.0.0.1", 17, 6082), false);
    check(&selection, &v4("10.0.0.1", 6, 6081), false);
    check(&selection, &v4("10.0.0.2", 17, 6081), false);
    for field in [[0x20, 0], [0, 1], [0x20, 0xb9]] {
        let mut frame = v4("10.0.0.1", 17, 6081);
        frame[20..22].copy_from_slice(&field);
        check(&selection, &frame, false);
    }
    let mut options = v4("10.0.0.1", 17, 6081);
    options[14] = 0x46;
    options.splice(34..34, [1, 1, 1, 1]);
    check(&selection, &options, true);

    let selection = Selection::new([ip("192.0.2.1")], (ip("fd00::1"), 6081));
    check(&selection, &v6("fd00::1", 17, 6081), true);
    check(&selection, &v6("fd00::1", 17, 6082), false);
    check(&selection, &v6("fd00::1", 44, 6081), false);
    check(&selection, &v6("fd00::2", 17, 6081), false);
}

#[test]
fn every_cut_of_a_frame_has_one_owner() {
    let selection = selection();
    for whole in [v4("192.0.2.2", 6, 80), v6("2001:db8::2", 58, 80), v4("10.0.0.1", 17, 6081)] {
        for length in 0..whole.len() {
            let frame = &whole[..length];
            let taken = run(&selection.socket_program(), frame) == TAKE;
            assert_eq!(run(&selection.drop_program(), frame) == TC_DROP, taken, "cut to {length}");
        }
    }
}

#[test]
fn a_hundred_services_of_each_family_fit_and_are_told_apart() {
    let addresses = (0..100_u8).flat_map(|n| [ip(&format!("192.0.2.{n}")), ip(&format!("2001:db8::{n:x}"))]);
    let selection = Selection::new(addresses, (ip("10.0.0.1"), 6081));
    assert!(selection.socket_program().len() < MAX_INSTRUCTIONS);
    check(&selection, &v4("192.0.2.0", 6, 80), true);
    check(&selection, &v4("192.0.2.99", 6, 80), true);
    check(&selection, &v4("192.0.2.100", 6, 80), false);
    check(&selection, &v6("2001:db8::63", 6, 80), true);
    check(&selection, &v6("2001:db8::64", 6, 80), false);
}
