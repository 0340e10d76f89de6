//! Small words for the expressions of `nft` that the ruleset is written in.

use std::{net::Ipv4Addr, ops::RangeInclusive};

use ipnet::Ipv4Net;
use nftables::{
    expr::{
        BinaryOperation, CT, Expression, Fib, FibFlag, FibResult, Meta, MetaKey, NamedExpression,
        Payload, PayloadField, Prefix, Range, SetItem,
    },
    stmt::{Match, Operator, Statement},
};

type Words = Expression<'static>;

/// `left right`
pub(super) fn is(left: Words, right: Words) -> Statement<'static> {
    Statement::Match(Match { left, right, op: Operator::EQ })
}

/// `left != right`
pub(super) fn is_not(left: Words, right: Words) -> Statement<'static> {
    Statement::Match(Match { left, right, op: Operator::NEQ })
}

/// `ct state`, `ct status`: any of these flags is set. As `is` it would be that no other is.
pub(super) fn has(key: &'static str, flags: &[&'static str]) -> Statement<'static> {
    let left = Expression::Named(NamedExpression::CT(CT { key: key.into(), ..CT::default() }));
    let right = match flags {
        [one] => text(one),
        several => Expression::List(several.iter().copied().map(text).collect()),
    };
    Statement::Match(Match { left, right, op: Operator::IN })
}

/// `left & (of) != value`
pub(super) fn bits_are_not(
    left: Words,
    of: [&'static str; 2],
    value: &'static str,
) -> Statement<'static> {
    let mask = BinaryOperation::OR(of.map(text).to_vec());
    let mask = Expression::BinaryOperation(Box::new(mask));
    let masked = Expression::BinaryOperation(Box::new(BinaryOperation::AND(left, mask)));
    is_not(masked, text(value))
}

/// `fib daddr type local`: an address of this host, whichever it is.
pub(super) fn destination_is_local() -> Statement<'static> {
    let fib = Fib { result: FibResult::Type, flags: [FibFlag::Daddr].into() };
    is(Expression::Named(NamedExpression::Fib(fib)), text("local"))
}

/// `fib saddr . iif oif missing`: no route leads back to the sender by the interface it came by.
pub(super) fn source_is_elsewhere() -> Statement<'static> {
    let fib = Fib { result: FibResult::Oif, flags: [FibFlag::Saddr, FibFlag::Iif].into() };
    is(Expression::Named(NamedExpression::Fib(fib)), Expression::Boolean(false))
}

/// A field of a header, as `tcp dport`.
pub(super) fn payload(protocol: &'static str, field: &'static str) -> Words {
    let field = PayloadField { protocol: protocol.into(), field: field.into() };
    Expression::Named(NamedExpression::Payload(Payload::PayloadField(field)))
}

/// `ip daddr`
pub(super) fn daddr() -> Words {
    payload("ip", "daddr")
}

/// A name.
pub(super) fn text(text: &str) -> Words {
    Expression::String(text.to_owned().into())
}

/// An address.
pub(super) fn address(address: Ipv4Addr) -> Words {
    text(&address.to_string())
}

/// A port, in host byte order.
pub(super) fn port(port: u16) -> Words {
    Expression::Number(port.into())
}

/// Ports from the first to the last, in host byte order.
pub(super) fn ports(range: &RangeInclusive<u16>) -> Words {
    Expression::Range(Box::new(Range { range: [port(*range.start()), port(*range.end())] }))
}

/// The addresses of a network.
pub(super) fn in_net(net: Ipv4Net) -> Words {
    Expression::Named(NamedExpression::Prefix(Prefix {
        addr: Box::new(address(net.network())),
        len: net.prefix_len().into(),
    }))
}

/// `iifname`: the interface by which a packet came.
pub(super) fn iifname() -> Words {
    meta(MetaKey::Iifname)
}

/// `oifname`: the interface by which it leaves.
pub(super) fn oifname() -> Words {
    meta(MetaKey::Oifname)
}

/// `meta oifkind`: what that interface is, as `bridge`.
pub(super) fn oifkind() -> Words {
    meta(MetaKey::Oifkind)
}

/// `meta iifkind { kinds }`: what the interface is that a packet came by. A physical one is of no
/// kind.
pub(super) fn iifkind_is(kinds: &[&'static str]) -> Statement<'static> {
    let kinds = kinds.iter().copied().map(|kind| SetItem::Element(text(kind))).collect();
    is(meta(MetaKey::Iifkind), Expression::Named(NamedExpression::Set(kinds)))
}

/// `meta skuid`: the user whose socket sends a packet; no rule about it is for what has none.
pub(super) fn skuid() -> Words {
    meta(MetaKey::Skuid)
}

/// `meta l4proto`
pub(super) fn l4proto() -> Words {
    meta(MetaKey::L4proto)
}

fn meta(key: MetaKey) -> Words {
    Expression::Named(NamedExpression::Meta(Meta { key }))
}
