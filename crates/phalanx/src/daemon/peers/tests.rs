use super::*;

struct Side {
    peers: Peers,
    events: mpsc::UnboundedReceiver<PeerEvent>,
    peer: Peer,
}

fn side(id: u32) -> Side {
    let identity = Identity::generate().unwrap();
    let (sender, events) = mpsc::unbounded_channel();
    let peers = Peers::start(MemberId(id), &identity, "127.0.0.1:0".parse().unwrap(), sender).unwrap();
    let address = peers.0.endpoint.local_addr().unwrap();
    Side { peers, events, peer: Peer { id: MemberId(id), address, fingerprint: identity.fingerprint() } }
}

async fn next(side: &mut Side) -> PeerEvent {
    tokio::time::timeout(Duration::from_secs(10), side.events.recv())
        .await
        .expect("an event in time")
        .unwrap()
}

async fn connected(side: &mut Side) -> Link {
    loop {
        if let PeerEvent::Connected(_, link) = next(side).await {
            return link;
        }
    }
}

#[tokio::test]
async fn frames_go_both_ways_over_one_connection_and_requests_are_answered() {
    let (mut a, mut b) = (side(1), side(2));
    a.peers.set_peers(std::slice::from_ref(&b.peer));
    b.peers.set_peers(std::slice::from_ref(&a.peer));
    let (to_b, to_a) = (connected(&mut a).await, connected(&mut b).await);
    a.peers.send(MemberId(2), to_b, b"to b".to_vec());
    b.peers.send(MemberId(1), to_a, b"to a".to_vec());
    assert!(
        matches!(next(&mut b).await, PeerEvent::Frame(MemberId(1), link, bytes) if link == to_a && bytes == b"to b")
    );
    assert!(
        matches!(next(&mut a).await, PeerEvent::Frame(MemberId(2), link, bytes) if link == to_b && bytes == b"to a")
    );

    // Either side may ask, though only the lower id dialled.
    let asking = b.peers.clone();
    let answer = tokio::spawn(async move { asking.request(MemberId(1), b"question").await });
    match next(&mut a).await {
        PeerEvent::Request { from, body, reply } => {
            assert_eq!((from, body.as_slice()), (MemberId(2), &b"question"[..]));
            reply.send(b"answer".to_vec()).unwrap();
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(answer.await.unwrap().unwrap(), b"answer");
}

#[tokio::test]
async fn a_lost_connection_is_said_and_dialled_again_as_a_new_link() {
    let (mut a, mut b) = (side(1), side(2));
    a.peers.set_peers(std::slice::from_ref(&b.peer));
    b.peers.set_peers(std::slice::from_ref(&a.peer));
    let first = connected(&mut a).await;
    connected(&mut b).await;
    b.peers.reset(MemberId(1));
    assert!(matches!(next(&mut a).await, PeerEvent::Disconnected(MemberId(2), link) if link == first));
    let second = connected(&mut a).await;
    assert_ne!(first, second);
    // What is meant for the link that is gone does not go out on the new one.
    a.peers.send(MemberId(2), first, b"old".to_vec());
    a.peers.send(MemberId(2), second, b"new".to_vec());
    connected(&mut b).await;
    assert!(matches!(next(&mut b).await, PeerEvent::Frame(MemberId(1), _, bytes) if bytes == b"new"));
}

#[tokio::test]
async fn a_certificate_that_nobody_gossips_gets_no_stream() {
    let (a, mut b) = (side(1), side(2));
    // b expects another certificate of a: it never takes a's stream for a's.
    let stranger = Peer { fingerprint: [7; 32], ..a.peer.clone() };
    a.peers.set_peers(std::slice::from_ref(&b.peer));
    b.peers.set_peers(&[stranger]);
    let heard = tokio::time::timeout(Duration::from_secs(3), b.events.recv()).await;
    assert!(heard.is_err(), "{heard:?}");
}

#[tokio::test]
async fn a_listener_with_another_certificate_than_the_gossip_names_gets_no_stream() {
    let (mut a, mut b) = (side(1), side(2));
    let impostor = Peer { fingerprint: [7; 32], ..b.peer.clone() };
    a.peers.set_peers(&[impostor]);
    b.peers.set_peers(std::slice::from_ref(&a.peer));
    let heard = tokio::time::timeout(Duration::from_secs(1), a.events.recv()).await;
    assert!(heard.is_err(), "{heard:?}");
    assert!(b.events.try_recv().is_err());
}
