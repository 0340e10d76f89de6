//! DNS messages: bytes to question, answer to bytes. No I/O.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use hickory_server::{
    net::xfer::Protocol,
    proto::{
        op::{Edns, MessageType, Metadata, OpCode, ResponseCode},
        rr::{DNSClass, Name, RData, Record, RecordType, rdata::PTR},
        serialize::binary::BinEncoder,
    },
    server::Request,
    zone_handler::MessageResponseBuilder,
};

use super::names::{Answer, Kind, Question};

/// Seconds an answer may be kept. Short, because an address belongs to another container as soon
/// as its own has stopped, and asking again costs no more than a packet to this very host; not 0,
/// so that a program that looks a name up for every request need not ask every time.
const TTL: u32 = 5;
/// Largest UDP answer without EDNS (RFC 1035), and the largest with it: what fits one packet of an
/// IPv6 link, as resolvers agreed on (DNS flag day 2020).
const UDP: u16 = 512;
const UDP_WITH_EDNS: u16 = 1232;

/// A message that came in.
#[derive(Debug)]
pub(super) enum Incoming {
    /// A question to answer.
    Question(Box<Request>, Question),
    /// Something that has its answer already: the message to send back.
    Settled(Vec<u8>),
    /// Nothing to answer at all: no DNS message, or an answer itself.
    Ignored,
}

/// Reads a message.
pub(super) fn read(bytes: &[u8], from: SocketAddr, protocol: Protocol) -> Incoming {
    // Answering answers would make two servers talk to each other for ever.
    let Some(&[id_high, id_low, flags, ..]) = bytes.get(..12) else { return Incoming::Ignored };
    if flags & 0x80 != 0 {
        return Incoming::Ignored;
    }
    let Ok(request) = Request::from_bytes(bytes.to_vec(), from, protocol) else {
        // A header alone: this is an answer, same operation, same RD, code 1 (FORMERR).
        let header = [id_high, id_low, 0x80 | flags & 0x79, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        return Incoming::Settled(header.into());
    };
    let code = match (request.queries.queries(), request.metadata.op_code) {
        _ if request.version() > 0 => ResponseCode::BADVERS,
        (_, opcode) if opcode != OpCode::Query => ResponseCode::NotImp,
        ([query], _) if query.query_class() != DNSClass::IN => ResponseCode::Refused,
        ([query], _) => match text_of(query.name().into()) {
            Some(name) => {
                let kind = match query.query_type() {
                    RecordType::A => Kind::Address,
                    RecordType::PTR => Kind::Pointer,
                    _ => Kind::Other,
                };
                return Incoming::Question(Box::new(request), Question { name, kind });
            }
            None => ResponseCode::Refused,
        },
        _ => ResponseCode::FormErr,
    };
    match encode(&request, code, &[]) {
        Ok(bytes) => Incoming::Settled(bytes),
        Err(_) => Incoming::Ignored,
    }
}

/// The message that answers a question. Cut to what the asker takes by UDP, with TC set, so that
/// it asks again by TCP.
pub(super) fn reply(request: &Request, answer: &Answer) -> Result<Vec<u8>> {
    let asked = request.queries.queries().first().context("a question without a name")?;
    let owner = Name::from(asked.name());
    let record = |data| Record::from_rdata(owner.clone(), TTL, data);
    let (code, records) = match answer {
        Answer::Addresses(addresses) => {
            let records = addresses.iter().map(|it| record(RData::A((*it).into())));
            (ResponseCode::NoError, records.collect())
        }
        Answer::Name(name) => {
            let name = Name::from_labels(name.split('.').map(str::as_bytes))?;
            (ResponseCode::NoError, vec![record(RData::PTR(PTR(name)))])
        }
        // Without an SOA record nobody keeps these (RFC 2308, section 5): the container that is
        // asked for too early is found by the next query.
        Answer::Empty => (ResponseCode::NoError, Vec::new()),
        Answer::Nobody => (ResponseCode::NXDomain, Vec::new()),
        Answer::Foreign => (ResponseCode::Refused, Vec::new()),
    };
    encode(request, code, &records)
}

fn encode(request: &Request, code: ResponseCode, records: &[Record]) -> Result<Vec<u8>> {
    let mut metadata = Metadata::response_from_request(&request.metadata);
    metadata.message_type = MessageType::Response;
    metadata.response_code = code;
    // We are the authority for what we answer, and we ask nobody else: RA stays off.
    metadata.authoritative = matches!(code, ResponseCode::NoError | ResponseCode::NXDomain);
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_WITH_EDNS);
    let mut builder = MessageResponseBuilder::from_message_request(request);
    let mut size = UDP;
    if request.edns.is_some() {
        builder.edns(&edns);
        size = request.max_payload().clamp(UDP, UDP_WITH_EDNS);
    }
    if request.protocol() == Protocol::Tcp {
        size = u16::MAX;
    }
    let response = builder.build(metadata, records, [], [], []);
    let mut bytes = Vec::with_capacity(usize::from(UDP));
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(size);
    response.destructive_emit(&mut encoder).context("write a DNS answer")?;
    Ok(bytes)
}

/// A name as text in lower case, without the dot at its end. `None` for what no container can be
/// called: bytes that are no text, and a dot inside a label, which the text could not tell.
fn text_of(name: Name) -> Option<String> {
    let mut text = String::new();
    for label in name.iter() {
        let label = std::str::from_utf8(label).ok().filter(|label| !label.contains('.'))?;
        if !text.is_empty() {
            text.push('.');
        }
        text.push_str(&label.to_ascii_lowercase());
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use hickory_server::proto::op::{Message, Query};
    use proptest::prelude::*;

    use super::*;

    fn query(name: &str, kind: RecordType) -> Message {
        let mut message = Message::query();
        message.metadata.id = 7;
        message.metadata.recursion_desired = true;
        let name = Name::from_labels(name.split('.').map(str::as_bytes)).unwrap();
        message.add_query(Query::query(name, kind));
        message
    }

    fn read_from(bytes: &[u8], protocol: Protocol) -> Incoming {
        read(bytes, ([10, 0, 0, 2], 1234).into(), protocol)
    }

    fn settled(bytes: &[u8]) -> Message {
        match read_from(bytes, Protocol::Udp) {
            Incoming::Settled(bytes) => Message::from_vec(&bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn replied(message: &Message, protocol: Protocol, answer: &Answer) -> (Message, usize) {
        match read_from(&message.to_vec().unwrap(), protocol) {
            Incoming::Question(request, _) => {
                let bytes = reply(&request, answer).unwrap();
                (Message::from_vec(&bytes).unwrap(), bytes.len())
            }
            other => panic!("{other:?}"),
        }
    }

    fn many() -> Answer {
        Answer::Addresses((1..=200).map(|last| [10, 0, 0, last].into()).collect())
    }

    #[test]
    fn names_are_read_in_lower_case_with_underscores_and_dots() {
        let message = query("Web_1.Prod.ov_net1", RecordType::A);
        let Incoming::Question(_, question) = read_from(&message.to_vec().unwrap(), Protocol::Udp)
        else {
            panic!("no question");
        };
        let name = "web_1.prod.ov_net1".to_owned();
        assert_eq!(question, Question { name, kind: Kind::Address });
    }

    #[test]
    fn an_answer_repeats_the_question_and_is_authoritative() {
        let message = query("T2.ov_net1", RecordType::A);
        let answer = Answer::Addresses(vec![[10, 0, 0, 3].into(), [10, 0, 0, 4].into()]);
        let (reply, _) = replied(&message, Protocol::Udp, &answer);
        let Metadata { id, authoritative, recursion_desired, recursion_available, .. } =
            reply.metadata;
        assert_eq!(
            (id, authoritative, recursion_desired, recursion_available),
            (7, true, true, false)
        );
        assert!(reply.queries[0].name().eq_case(message.queries[0].name()), "the case is kept");
        assert!(reply.answers.iter().all(|it| it.ttl == TTL && it.dns_class == DNSClass::IN));
        let found: Vec<_> = reply.answers.iter().map(|it| it.data.to_string()).collect();
        assert_eq!(found, ["10.0.0.3", "10.0.0.4"]);
    }

    #[test]
    fn a_pointer_is_sent_with_underscore_and_dots() {
        let message = query("3.0.0.10.in-addr.arpa", RecordType::PTR);
        let answer = Answer::Name("web_1.prod.ov_net1".into());
        let (reply, _) = replied(&message, Protocol::Udp, &answer);
        let RData::PTR(PTR(name)) = &reply.answers[0].data else { panic!("no PTR") };
        assert_eq!(name.to_string(), "web_1.prod.ov_net1.");
    }

    #[test]
    fn codes_tell_foreign_from_empty_from_nobody() {
        let message = query("t2", RecordType::AAAA);
        for (answer, code, authoritative) in [
            (Answer::Empty, ResponseCode::NoError, true),
            (Answer::Nobody, ResponseCode::NXDomain, true),
            (Answer::Foreign, ResponseCode::Refused, false),
        ] {
            let (reply, _) = replied(&message, Protocol::Udp, &answer);
            assert_eq!(reply.metadata.response_code, code);
            assert_eq!(reply.metadata.authoritative, authoritative);
            assert!(reply.answers.is_empty() && reply.authorities.is_empty());
        }
    }

    #[test]
    fn what_does_not_fit_is_cut_and_marked() {
        let mut message = query("MANY", RecordType::A);
        let (reply, length) = replied(&message, Protocol::Udp, &many());
        assert!(reply.metadata.truncation && length <= 512, "{length}");
        assert!(reply.answers.len() > 20, "{}: names are compressed", reply.answers.len());
        for (offered, most) in [(100, 512), (800, 800), (4096, 1232)] {
            let mut edns = Edns::new();
            edns.set_max_payload(offered);
            message.set_edns(edns);
            let (reply, length) = replied(&message, Protocol::Udp, &many());
            assert!(reply.metadata.truncation && length <= most, "{length} of {offered}");
            assert!(length > most - 40, "{length} of {offered}: no more than needed is cut");
        }
        let (reply, _) = replied(&message, Protocol::Tcp, &many());
        assert!(!reply.metadata.truncation);
        assert_eq!(reply.answers.len(), 200);
    }

    #[test]
    fn edns_is_answered_with_edns_and_an_unknown_version_told() {
        let mut message = query("t2", RecordType::A);
        let (reply, _) = replied(&message, Protocol::Udp, &Answer::Empty);
        assert!(reply.edns.is_none());
        message.set_edns(Edns::new());
        let (reply, _) = replied(&message, Protocol::Udp, &Answer::Empty);
        assert_eq!(reply.edns.unwrap().max_payload(), UDP_WITH_EDNS);
        let mut edns = Edns::new();
        edns.set_version(1);
        message.set_edns(edns);
        let reply = settled(&message.to_vec().unwrap());
        // By number, which is also that of BADSIG.
        assert_eq!(u16::from(reply.metadata.response_code), u16::from(ResponseCode::BADVERS));
    }

    #[test]
    fn what_is_no_question_has_its_answer_at_once() {
        let code = |message: &Message| settled(&message.to_vec().unwrap()).metadata.response_code;
        let mut update = query("t2", RecordType::A);
        update.metadata.op_code = OpCode::Notify;
        assert_eq!(code(&update), ResponseCode::NotImp);
        let mut two = query("t2", RecordType::A);
        two.add_query(Query::query(Name::root(), RecordType::A));
        assert_eq!(code(&two), ResponseCode::FormErr);
        let mut chaos = query("version.bind", RecordType::TXT);
        chaos.queries[0].set_query_class(DNSClass::CH);
        assert_eq!(code(&chaos), ResponseCode::Refused);
        let mut odd = query("t2", RecordType::A);
        odd.queries[0].set_name(Name::from_labels([b"a.b".as_slice()]).unwrap());
        assert_eq!(code(&odd), ResponseCode::Refused);
        assert_eq!(code(&Message::query()), ResponseCode::FormErr);
    }

    #[test]
    fn a_message_cut_at_any_byte_is_a_format_error_or_nothing() {
        let whole = query("t2.ov_net1", RecordType::A).to_vec().unwrap();
        for cut in 0..whole.len() {
            match read_from(&whole[..cut], Protocol::Udp) {
                Incoming::Ignored => assert!(cut < 12),
                Incoming::Settled(bytes) => {
                    let reply = Message::from_vec(&bytes).unwrap().metadata;
                    assert_eq!((reply.id, reply.response_code), (7, ResponseCode::FormErr));
                    assert!(reply.recursion_desired && cut >= 12);
                }
                other => panic!("{cut}: {other:?}"),
            }
        }
    }

    #[test]
    fn answers_are_not_answered() {
        let mut message = query("t2", RecordType::A);
        message.metadata.message_type = MessageType::Response;
        let bytes = message.to_vec().unwrap();
        assert!(matches!(read_from(&bytes, Protocol::Udp), Incoming::Ignored));
    }

    proptest! {
        /// Whatever comes, what goes out is one DNS answer of a size the asker takes.
        #[test]
        fn no_bytes_make_it_fail(
            mut bytes in prop::collection::vec(any::<u8>(), 0..80), one_question in any::<bool>(),
        ) {
            if one_question && bytes.len() >= 12 {
                bytes[2..12].copy_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
            }
            let sent = match read_from(&bytes, Protocol::Udp) {
                Incoming::Ignored => return Ok(()),
                Incoming::Settled(sent) => sent,
                Incoming::Question(request, _) => match reply(&request, &many()) {
                    Ok(sent) => sent,
                    Err(_) => return Ok(()),
                },
            };
            prop_assert!(sent.len() <= usize::from(UDP_WITH_EDNS));
            prop_assert_eq!(&sent[..2], &bytes[..2]);
            prop_assert!(sent[2] & 0x80 != 0);
        }
    }
}
