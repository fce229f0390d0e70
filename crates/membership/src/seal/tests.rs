use super::*;

fn life(sender: u32, session: u64) -> Life {
    Life { sender: MemberId(sender), session, salt: 7 }
}

fn ring(keys: &[u8]) -> KeyRing {
    KeyRing::new(keys.iter().map(|byte| [*byte; 32]).collect()).unwrap()
}

fn seal(keys: &[u8], sender: u32, session: u64) -> Seal {
    Seal::new(&ring(keys), "test", life(sender, session)).unwrap()
}

fn open(receiver: &mut Seal, datagram: &[u8]) -> Result<Vec<u8>, Unopened> {
    let mut opened = receiver.open(datagram)?;
    receiver.accept(&mut opened);
    Ok(opened.plain)
}

#[test]
fn what_one_seals_another_opens_once() {
    let (mut a, mut b) = (seal(&[1], 1, 1), seal(&[1], 2, 1));
    let datagram = a.sealer.seal(&[b"hel", b"lo"]).unwrap();
    assert_eq!(open(&mut b, &datagram).unwrap(), b"hello");
    assert_eq!(open(&mut b, &datagram), Err(Unopened::Replayed));
}

#[test]
fn any_flipped_bit_is_noticed() {
    let (mut a, b) = (seal(&[1], 1, 1), seal(&[1], 2, 1));
    let datagram = a.sealer.seal(&[b"hello"]).unwrap();
    for bit in 0..datagram.len() * 8 {
        let mut damaged = datagram.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(b.open(&damaged), Err(Unopened::Foreign | Unopened::Damaged)), "bit {bit}");
    }
    assert!(b.open(&datagram).is_ok());
}

#[test]
fn any_shortened_datagram_is_noticed() {
    let (mut a, b) = (seal(&[1], 1, 1), seal(&[1], 2, 1));
    let datagram = a.sealer.seal(&[b"hello"]).unwrap();
    for length in 0..datagram.len() {
        assert!(b.open(&datagram[..length]).is_err(), "length {length}");
    }
}

#[test]
fn another_key_or_another_cluster_is_foreign_or_damaged() {
    let mut a = seal(&[1], 1, 1);
    let datagram = a.sealer.seal(&[b"hello"]).unwrap();
    assert_eq!(seal(&[2], 2, 1).open(&datagram).unwrap_err(), Unopened::Foreign);
    let other = Seal::new(&ring(&[1]), "other", life(2, 1)).unwrap();
    assert_eq!(other.open(&datagram).unwrap_err(), Unopened::Damaged);
}

#[test]
fn an_earlier_session_is_stale_once_a_later_one_was_heard() {
    let (mut old, mut new, mut b) = (seal(&[1], 1, 1), seal(&[1], 1, 2), seal(&[1], 2, 1));
    let (first, second) = (old.sealer.seal(&[b"1"]).unwrap(), old.sealer.seal(&[b"2"]).unwrap());
    assert!(open(&mut b, &first).is_ok());
    let later = new.sealer.seal(&[b"3"]).unwrap();
    assert!(open(&mut b, &later).is_ok());
    assert_eq!(open(&mut b, &second), Err(Unopened::Stale { sender: MemberId(1), newest: 2 }));
}

#[test]
fn keys_rotate_without_a_datagram_lost() {
    let (mut a, mut b) = (seal(&[1], 1, 1), seal(&[1], 2, 1));
    let exchange = |a: &mut Seal, b: &mut Seal| {
        let datagram = a.sealer.seal(&[b"x"]).unwrap();
        open(b, &datagram).unwrap();
        let datagram = b.sealer.seal(&[b"y"]).unwrap();
        open(a, &datagram).unwrap();
    };
    exchange(&mut a, &mut b);
    for keys in [&[1, 2][..], &[2, 1], &[2]] {
        a.set_keys(&ring(keys));
        exchange(&mut a, &mut b);
        b.set_keys(&ring(keys));
        exchange(&mut a, &mut b);
    }
    // The twin: the old key alone no longer opens anything.
    let datagram = a.sealer.seal(&[b"x"]).unwrap();
    assert_eq!(seal(&[1], 3, 1).open(&datagram).unwrap_err(), Unopened::Foreign);
}

#[test]
fn the_window_takes_reordering_but_no_counter_twice() {
    let mut window = Window::default();
    for counter in [5, 3, 4, 1000, 1, 2000, 1500, 977] {
        assert!(window.is_fresh(counter), "{counter}");
        window.mark(counter);
        assert!(!window.is_fresh(counter), "{counter}");
    }
    // 2000 - 1024 = 976 and older have left the window, and so has what was seen there.
    assert!(!window.is_fresh(976));
    assert!(window.is_fresh(978));
    window.mark(1_000_000);
    assert!(!window.is_fresh(2000) && window.is_fresh(999_999));
}

#[test]
fn a_key_file_is_read_and_its_bad_line_named() {
    let good = format!("# comment\n\n{}\n{}\n", "ab".repeat(32), "01".repeat(32));
    let ring = KeyRing::parse(&good).unwrap();
    assert_eq!(ring.keys, [[0xab; 32], [1; 32]]);
    assert_eq!(ring.cookies().count(), 2);
    assert_eq!(KeyRing::parse("# nothing"), Err(KeyError::Empty));
    assert_eq!(KeyRing::parse(&"0".repeat(63)), Err(KeyError::Malformed { line: 1 }));
    assert_eq!(KeyRing::parse(&format!("\n{}é", "0".repeat(62))), Err(KeyError::Malformed { line: 2 }));
    assert_eq!(format!("{ring:?}"), "KeyRing(2 keys)");
}
