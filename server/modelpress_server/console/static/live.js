"use strict";
// Brings the progress of a job to its open page. All that comes is text, and is shown as text.
for (const box of document.querySelectorAll("[data-live]")) {
  const shown = new Map();
  for (const element of box.querySelectorAll("[data-show]")) shown.set(element.dataset.show, element);
  const state = document.querySelector("h1 .badge")?.textContent;

  const follow = () => {
    const source = new EventSource(box.dataset.live);
    source.onmessage = (event) => {
      const news = JSON.parse(event.data);
      for (const [name, element] of shown) {
        if (element instanceof HTMLProgressElement) element.value = news[name];
        else element.textContent = news[name];
      }
      if (news.state.toLowerCase() !== state) {
        source.close();
        location.reload(); // the page of a job in another state has other parts
      }
    };
    source.onerror = () => {
      // The browser comes back by itself where the connection was cut, and gives up where it was refused.
      if (source.readyState === EventSource.CLOSED) setTimeout(follow, 10000);
    };
  };
  follow();
}
