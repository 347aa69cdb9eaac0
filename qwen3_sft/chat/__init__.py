"""From conversations to tokens that know whether they are trained; `render` is the entrance."""
