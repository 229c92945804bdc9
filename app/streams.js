// Gradio's page opens a stream of answers when it asks for something and believes that none is open; the server closes it
// once nothing is left to answer. What is asked at that very moment is asked of a stream that is gone: its answer never
// comes, and the page stands still. The next question opens a stream that brings both answers. So where a stream has been
// closed and none was opened since the last question, one is asked here.
(() => {
  const plain = window.fetch, PATIENCE = 1000;
  let open = false, events = 0, asked = 0, opened = 0;

  function look() {
    if (!open && asked > opened) document.querySelector("#nudge")?.click();
  }

  // The answers as they are; the one that says that no more will come is noted.
  function watched(answers) {
    const decoder = new TextDecoder();
    let end = "";
    const seen = new TransformStream({
      transform(chunk, out) {
        end = end.slice(-20) + decoder.decode(chunk, { stream: true });
        if (end.includes('"close_stream"')) {
          open = false;
          setTimeout(look, PATIENCE);
        }
        out.enqueue(chunk);
      },
    });
    return new Response(answers.body.pipeThrough(seen), answers);
  }

  window.fetch = async (...request) => {
    const url = String(request[0]?.url ?? request[0]);
    if (url.includes("/queue/data")) {
      open = true;
      opened = ++events;
      try {
        return watched(await plain(...request));
      } catch (error) {
        open = false;
        throw error;
      }
    }
    const answer = await plain(...request);
    if (url.includes("/queue/join")) {
      asked = ++events;
      setTimeout(look, PATIENCE);
    }
    return answer;
  };
})();
