//! When to stop.

use tokio::sync::watch;

/// Says when a session is over: because Docker went away, or because the agent ends. From then on
/// nothing new is begun.
#[derive(Clone, Debug)]
pub(super) struct Over {
    session: watch::Receiver<bool>,
    agent: watch::Receiver<bool>,
}

impl Over {
    /// Over as soon as one of these is true, or its sender gone.
    pub(super) fn new(session: watch::Receiver<bool>, agent: watch::Receiver<bool>) -> Self {
        Self { session, agent }
    }

    /// Whether it is over.
    pub(super) fn now(&self) -> bool {
        let is = |receiver: &watch::Receiver<bool>| {
            *receiver.borrow() || receiver.has_changed().is_err()
        };
        is(&self.session) || is(&self.agent)
    }

    /// Waits until it is over.
    pub(super) async fn wait(&mut self) {
        tokio::select! {
            () = true_in(&mut self.session) => {}
            () = true_in(&mut self.agent) => {}
        }
    }

    /// The answer to a question, which is dropped when it is over. Not for what changes anything.
    pub(super) async fn or<T>(&mut self, question: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            () = self.wait() => None,
            answer = question => Some(answer),
        }
    }
}

/// Waits until it is true, or its sender is gone.
pub(super) async fn true_in(receiver: &mut watch::Receiver<bool>) {
    // The guard this returns would be held on to by a select!.
    let _ = receiver.wait_for(|now| *now).await;
}
