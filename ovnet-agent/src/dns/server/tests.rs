use std::{collections::BTreeSet, sync::Mutex, time::Instant};

use hickory_server::proto::{
    op::{Message, Query, ResponseCode},
    rr::{Name, RData, RecordType},
};

use super::*;

/// Knows askers by the last byte of their loopback address: 1 is on the network, 2 must be looked
/// for, 4 again, 5 is never found; others are strangers.
struct Fake {
    finds: AtomicUsize,
    addresses: Mutex<Vec<Ipv4Addr>>,
}

impl Knowledge for Fake {
    fn known(&self, source: Ipv4Addr) -> Asker {
        match source.octets()[3] {
            1 => Asker::Known(on_network()),
            2 => Asker::New,
            4 => Asker::Familiar,
            5 => Asker::New,
            _ => Asker::Known(Networks::default()),
        }
    }

    async fn find(&self, source: Ipv4Addr) -> Networks {
        self.finds.fetch_add(1, Ordering::SeqCst);
        tokio::task::yield_now().await;
        match source.octets()[3] {
            2 | 4 => on_network(),
            5 => std::future::pending().await,
            _ => Networks::default(),
        }
    }

    fn answer(&self, networks: &[NetworkRecord], question: &Question, turn: usize) -> Answer {
        let mut addresses = self.addresses.lock().unwrap().clone();
        match (networks, question.name.as_str()) {
            ([], _) => Answer::Foreign,
            (_, "t2") => {
                let several = addresses.len();
                addresses.rotate_left(turn % several);
                Answer::Addresses(addresses)
            }
            (_, "empty") => Answer::Empty,
            (_, "nobody") => Answer::Nobody,
            (_, "pointer") => Answer::Name("t2.ov_net1".into()),
            _ => Answer::Foreign,
        }
    }
}

fn fake() -> Arc<Fake> {
    let addresses = Mutex::new(vec![[10, 0, 0, 3].into(), [10, 0, 0, 4].into()]);
    Arc::new(Fake { finds: AtomicUsize::new(0), addresses })
}

fn on_network() -> Networks {
    let record = r#"{"v":1,"id":"4d0b","name":"ov_net1","vni":4096,"subnet":"10.0.0.0/24",
        "gateway":"10.0.0.1"}"#;
    Arc::new([serde_json::from_str(record).unwrap()])
}

struct Running {
    address: SocketAddr,
    knowledge: Arc<Fake>,
    _tasks: JoinSet<()>,
}

fn start() -> Running {
    let knowledge = fake();
    let listeners = Listeners::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listeners.address().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(listeners.run(Arc::clone(&knowledge)));
    Running { address, knowledge, _tasks: tasks }
}

fn query(id: u16, name: &str) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = id;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

async fn client(last: u8, server: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, last), 0)).await.unwrap();
    socket.connect(server).await.unwrap();
    socket
}

async fn receive(socket: &UdpSocket) -> Message {
    let mut buffer = [0; 4096];
    let length = timeout(IDLE, socket.recv(&mut buffer)).await.expect("no answer").unwrap();
    Message::from_vec(&buffer[..length]).unwrap()
}

async fn ask(socket: &UdpSocket, name: &str) -> Message {
    socket.send(&query(1, name)).await.unwrap();
    receive(socket).await
}

async fn ask_by_tcp(stream: &mut TcpStream, bytes: &[u8]) -> Result<Message> {
    stream.write_u16(u16::try_from(bytes.len())?).await?;
    stream.write_all(bytes).await?;
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(Message::from_vec(&message)?)
}

fn addresses(message: &Message) -> Vec<Ipv4Addr> {
    let address = |data: &RData| match data {
        RData::A(address) => address.0,
        other => panic!("{other:?}"),
    };
    message.answers.iter().map(|it| address(&it.data)).collect()
}

#[tokio::test]
async fn every_kind_of_answer_comes_by_udp_and_tcp() {
    let server = start();
    let socket = client(1, server.address).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    for (name, code, answers) in [
        ("t2.", ResponseCode::NoError, 2),
        ("T2.", ResponseCode::NoError, 2),
        ("empty.", ResponseCode::NoError, 0),
        ("pointer.", ResponseCode::NoError, 1),
        ("nobody.", ResponseCode::NXDomain, 0),
        ("example.org.", ResponseCode::Refused, 0),
    ] {
        let by_udp = ask(&socket, name).await;
        let by_tcp = ask_by_tcp(&mut stream, &query(1, name)).await.unwrap();
        for message in [by_udp, by_tcp] {
            assert_eq!(message.metadata.response_code, code, "{name}");
            assert_eq!(message.answers.len(), answers, "{name}");
        }
    }
}

#[tokio::test]
async fn several_addresses_are_rotated() {
    let server = start();
    let socket = client(1, server.address).await;
    let mut first = BTreeSet::new();
    for _ in 0..2 {
        first.insert(addresses(&ask(&socket, "t2.").await)[0]);
    }
    assert_eq!(first.len(), 2);
}

#[tokio::test]
async fn an_asker_is_looked_for_and_a_stranger_refused() {
    let server = start();
    let looked_for = client(2, server.address).await;
    assert_eq!(addresses(&ask(&looked_for, "t2.").await).len(), 2);
    assert_eq!(server.knowledge.finds.load(Ordering::SeqCst), 1);
    let stranger = client(3, server.address).await;
    let refused = ask(&stranger, "t2.").await;
    assert_eq!(refused.metadata.response_code, ResponseCode::Refused);
}

#[tokio::test]
async fn who_was_known_before_does_not_compete_with_forged_addresses() {
    let server = start();
    let forged = client(5, server.address).await;
    let known_before = client(4, server.address).await;
    for _ in 0..LOOKING + 10 {
        forged.send(&query(1, "t2.")).await.unwrap();
    }
    let began = Instant::now();
    assert_eq!(addresses(&ask(&known_before, "t2.").await).len(), 2);
    assert!(began.elapsed() < LOOK, "the forged ones have not given up yet");
    assert_eq!(server.knowledge.finds.load(Ordering::SeqCst), LOOKING + 1);
}

#[tokio::test]
async fn what_is_cut_by_udp_is_whole_by_tcp() {
    let server = start();
    *server.knowledge.addresses.lock().unwrap() =
        (1..=250).map(|last| [10, 0, 0, last].into()).collect();
    let socket = client(1, server.address).await;
    let cut = ask(&socket, "t2.").await;
    assert!(cut.metadata.truncation && !cut.answers.is_empty() && cut.answers.len() < 250);
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let whole = ask_by_tcp(&mut stream, &query(1, "t2.")).await.unwrap();
    assert!(!whole.metadata.truncation);
    assert_eq!(addresses(&whole).len(), 250);
}

#[tokio::test]
async fn garbage_harms_nothing() {
    let server = start();
    let socket = client(1, server.address).await;
    let whole = query(1, "t2.");
    for cut in 0..whole.len() {
        socket.send(&whole[..cut]).await.unwrap();
        if cut >= 12 {
            let code = receive(&socket).await.metadata.response_code;
            assert_eq!(code, ResponseCode::FormErr, "cut at {cut}");
        }
    }
    for length in [1, 11, 600, 4097, 9000] {
        socket.send(&vec![0xff; length]).await.unwrap();
    }
    assert_eq!(addresses(&ask(&socket, "t2.").await).len(), 2);

    for garbage in [&[0xff; 2000][..], &[0, 5, 1], &[0, 0]] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        // It may be closed with a reset already.
        let _ = stream.shutdown().await;
        let mut rest = Vec::new();
        let _ = timeout(IDLE, stream.read_to_end(&mut rest)).await.expect("stays open");
        assert!(rest.is_empty());
    }
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    ask_by_tcp(&mut stream, &whole).await.unwrap();
}

#[tokio::test]
async fn clients_that_hang_keep_nobody_away_and_are_closed() {
    let server = start();
    let mut hanging = Vec::new();
    for _ in 0..CONNECTIONS_FROM_ONE + 3 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        // One byte of the length, and then nothing.
        let _ = stream.write_all(&[0]).await;
        hanging.push(stream);
    }
    // From the same address no more are taken; from another they are.
    let other = tokio::net::TcpSocket::new_v4().unwrap();
    other.bind((Ipv4Addr::new(127, 0, 0, 2), 0).into()).unwrap();
    let mut other = other.connect(server.address).await.unwrap();
    let whole = query(1, "t2.");
    assert_eq!(addresses(&ask_by_tcp(&mut other, &whole).await.unwrap()).len(), 2);
    let socket = client(1, server.address).await;
    assert_eq!(addresses(&ask(&socket, "t2.").await).len(), 2);
    let began = Instant::now();
    for mut stream in hanging {
        let closed = timeout(IDLE + RETRY, stream.read(&mut [0; 1])).await;
        assert!(matches!(closed, Ok(Ok(0) | Err(_))), "{closed:?} after {:?}", began.elapsed());
    }
    let mut again = TcpStream::connect(server.address).await.unwrap();
    ask_by_tcp(&mut again, &whole).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_queries_at_once_are_all_answered() {
    let server = start();
    let socket = client(1, server.address).await;
    // Of the kernel's small buffer for a client without root some answers are lost; a resolver
    // asks again, and so does this. With root nothing is lost.
    let enlarged = setsockopt(&socket, sockopt::RcvBufForce, &(4 * RECEIVE_BUFFER)).is_ok();
    let mut missing: BTreeSet<u16> = (0..1000).collect();
    for attempt in 0..5 {
        for id in &missing {
            socket.send(&query(*id, "t2.")).await.unwrap();
        }
        let mut buffer = [0; 512];
        while let Ok(length) = timeout(Duration::from_secs(1), socket.recv(&mut buffer)).await {
            missing.remove(&Message::from_vec(&buffer[..length.unwrap()]).unwrap().metadata.id);
            if missing.is_empty() {
                assert!(attempt == 0 || !enlarged, "some were lost");
                return;
            }
        }
    }
    panic!("{} of 1000 were never answered", missing.len());
}

/// Asks until there is an answer.
async fn answered(address: SocketAddr) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        let socket = client(1, address).await;
        // An error is what the last query met: nobody listened.
        if socket.send(&query(1, "t2.")).await.is_ok() {
            let mut buffer = [0; 512];
            if matches!(timeout(PAUSE, socket.recv(&mut buffer)).await, Ok(Ok(_))) {
                return;
            }
        }
        tokio::task::yield_now().await;
    }
    panic!("no answer from {address}");
}

#[tokio::test]
async fn it_moves_with_the_address_and_waits_for_a_taken_port() {
    let free = Listeners::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = free.address().unwrap().port();
    let at = |last: u8| Ipv4Addr::new(127, 0, 0, last);
    let (tell, told) = watch::channel(None);
    let mut server = JoinSet::new();
    server.spawn(serve(told, port, fake()));

    // Taken by `free`.
    tell.send_replace(Some(at(1)));
    let error = Listeners::bind(SocketAddrV4::new(at(1), port)).unwrap_err().to_string();
    assert!(error.contains("is taken") && error.contains("--dns"), "{error}");
    drop(free);
    answered((at(1), port).into()).await;

    tell.send_replace(Some(at(9)));
    answered((at(9), port).into()).await;
    Listeners::bind(SocketAddrV4::new(at(1), port)).expect("it has left the old address");
    tell.send_replace(None);
    tell.send_replace(Some(at(9)));
    answered((at(9), port).into()).await;
    // The last address stays when nobody can tell another.
    drop(tell);
    answered((at(9), port).into()).await;
}

#[tokio::test]
async fn an_address_that_is_not_there_yet_can_be_listened_on() {
    Listeners::bind(SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 77), 0)).unwrap();
}
