//! Where something cannot be done, the forwarder refuses by name when it starts, and changes nothing.

use std::net::{IpAddr, UdpSocket};

use phalanx_forwarder::Plan;
use phalanx_forwarder::conformance::world::World;
use phalanx_forwarder_rawsock::{Config, RawsockForwarder};
use phalanx_integration::wire::{INTERFACE, Wire, ip};

fn config() -> Config {
    Config { ring_bytes: 1 << 20, ..Config::new(vec![INTERFACE.to_owned()], ip("10.0.0.1")) }
}

/// The sentence by which a start on the wire's host is refused.
fn refusal(wire: &Wire, config: &Config, plan: Plan) -> String {
    let refused = wire.host().enter(|| RawsockForwarder::start(config, plan)).expect("enter");
    let sentence = refused.expect_err("the start is refused").to_string();
    println!("{sentence}");
    let mut netlink = wire.host().netlink().expect("netlink");
    assert!(netlink.filters(wire.index()).is_ok_and(|filters| filters.is_empty()), "a drop was left behind");
    sentence
}

fn on(interface: &str) -> Config {
    Config { interfaces: vec![interface.to_owned()], ..config() }
}

/// The twin of all that follow: nothing is wrong with what they change one thing of.
#[test]
fn a_good_configuration_is_not_refused() {
    let wire = Wire::new();
    let start = || RawsockForwarder::start(&config(), World::default().plan());
    drop(wire.host().enter(start).expect("enter").expect("the start succeeds"));
}

#[test]
fn interfaces_that_cannot_be_used_are_named() {
    let wire = Wire::new();
    let mut netlink = wire.host().netlink().expect("netlink");
    let plan = || World::default().plan();
    assert_eq!(refusal(&wire, &on("eth7"), plan()), "interfaces: there is no interface eth7");
    assert_eq!(
        refusal(&wire, &Config { interfaces: Vec::new(), ..config() }, plan()),
        "interfaces: name at least one"
    );
    netlink.set_mtu(wire.index(), 1279).expect("mtu");
    assert_eq!(
        refusal(&wire, &config(), plan()),
        "interfaces: the MTU of eth0 is 1279; it must be at least 1280"
    );
    // IPv6 left the interface with an MTU that is not its own, and took its addresses along: another wire for what follows.
    let wire = Wire::new();
    let made = wire.host().enter(tun).expect("enter").expect("a TUN device");
    assert_eq!(refusal(&wire, &on("tun0"), plan()), "interfaces: tun0 is not an Ethernet interface");
    drop(made);
}

/// A device whose packets have no Ethernet header; it is gone when its file is.
fn tun() -> std::io::Result<std::fs::File> {
    use std::os::fd::AsRawFd as _;
    let file = std::fs::File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"tun0") {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: the request is of the type that this call reads.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(file) }
}

#[test]
fn a_data_address_that_is_not_ours_or_taken_is_named() {
    let wire = Wire::new();
    let elsewhere: IpAddr = ip("10.0.0.77");
    let mut plan = World::default().plan();
    plan.members[0].address = elsewhere;
    let sentence = refusal(&wire, &Config { data_address: elsewhere, ..config() }, plan.clone());
    assert!(sentence.starts_with("cannot receive hand-offs on 10.0.0.77 port 6081: "), "{sentence}");
    assert_eq!(
        refusal(&wire, &config(), plan),
        "the data address 10.0.0.1 is not the one that the plan gives the local member"
    );
    let taken = wire.host().enter(|| UdpSocket::bind("10.0.0.1:6081")).expect("enter").expect("bind");
    let sentence = refusal(&wire, &config(), World::default().plan());
    assert!(sentence.starts_with("cannot receive hand-offs on 10.0.0.1 port 6081: "), "{sentence}");
    drop(taken);
}

#[test]
fn more_services_than_a_filter_takes_are_counted() {
    let wire = Wire::new();
    let mut plan = World::default().plan();
    let service = plan.services[0].clone();
    plan.services.extend((0..3000_u32).map(|n| phalanx_forwarder::PlanService {
        address: IpAddr::V4(std::net::Ipv4Addr::from(0xc633_0000 + n)),
        ..service.clone()
    }));
    let sentence = refusal(&wire, &config(), plan);
    assert!(sentence.contains("filter instructions are needed and the kernel takes 4096"), "{sentence}");
}

/// Merged frames cannot be taken apart where the kernel does not say how they were put together.
#[test]
fn a_kernel_that_does_not_tell_of_merged_frames_is_refused() {
    let wire = Wire::new();
    let start = |old: bool| {
        if old {
            refuse_offload_headers();
        }
        RawsockForwarder::start(&config(), World::default().plan()).err().map(|error| error.to_string())
    };
    let sentence = wire.host().enter(|| start(true)).expect("enter").expect("the start is refused");
    for word in
        ["open a packet socket on eth0", "how frames were merged", "PACKET_VNET_HDR", "Invalid argument"]
    {
        assert!(sentence.contains(word), "{sentence:?} does not say {word:?}");
    }
    assert_eq!(wire.host().enter(|| start(false)).expect("enter"), None, "the twin");
}

/// Has the kernel refuse `PACKET_VNET_HDR` to the calling thread, as kernels did that knew it not (seccomp(2)).
fn refuse_offload_headers() {
    const fn step(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code: code as u16, jt, jf, k }
    }
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    /// Offsets in `struct seccomp_data`: the call, and the lower halves of level and option.
    const CALL: u32 = 0;
    const LEVEL: u32 = 24;
    const OPTION: u32 = 32;
    let mut program = [
        step(LOAD, 0, 0, CALL),
        step(EQUAL, 0, 5, libc::SYS_setsockopt as u32),
        step(LOAD, 0, 0, LEVEL),
        step(EQUAL, 0, 3, libc::SOL_PACKET as u32),
        step(LOAD, 0, 0, OPTION),
        step(EQUAL, 0, 1, libc::PACKET_VNET_HDR as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EINVAL as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program lives until the calls return; both bind the calling thread and those it starts.
    let result = unsafe {
        let none: libc::c_ulong = 0;
        let one: libc::c_ulong = 1;
        let filter = libc::c_ulong::from(libc::SECCOMP_MODE_FILTER);
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, one, none, none, none)
            | libc::prctl(libc::PR_SET_SECCOMP, filter, &raw const program)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn without_its_capabilities_the_permission_is_named() {
    let wire = Wire::new();
    let refused = |without: u32| {
        let start = || {
            give_up(without);
            RawsockForwarder::start(&config(), World::default().plan()).err().map(|error| error.to_string())
        };
        wire.host().enter(start).expect("enter")
    };
    /// include/uapi/linux/capability.h
    const CAP_NET_ADMIN: u32 = 12;
    const CAP_NET_RAW: u32 = 13;
    for capability in [CAP_NET_RAW, CAP_NET_ADMIN] {
        let sentence = refused(1 << capability).expect("the start is refused");
        assert!(
            sentence.starts_with("no permission for raw sockets: the process needs CAP_NET_RAW"),
            "{sentence}"
        );
    }
    assert_eq!(refused(0), None, "the twin: with both it starts");
}

/// Takes capabilities from the calling thread, for good.
fn give_up(capabilities: u32) {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    // _LINUX_CAPABILITY_VERSION_3; 0 is the calling thread.
    let mut header = Header { version: 0x2008_0522, pid: 0 };
    let mut data = [Data::default(); 2];
    // SAFETY: capget(2) writes two such records in version 3.
    let read = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    assert_eq!(read, 0);
    data[0].effective &= !capabilities;
    // SAFETY: capset(2) reads two such records in version 3, and changes the calling thread only.
    let written = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    assert_eq!(written, 0, "{}", std::io::Error::last_os_error());
}
